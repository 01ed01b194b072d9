"""Reading and writing the user's text files, with errors that name them."""

from __future__ import annotations

import sys
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span

from .places import Text, shown

STDOUT = "-"
"""What a user gives for standard output; a file is never called so by it."""
MAX_BYTES = 32 << 20
"""Largest file; a quantization config that names every expert of a 550B model is below it."""


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Read a UTF-8 file; N3CError: FILE where it cannot be read, SPEC where it is not text or above `most` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        message = f"cannot read {shown(str(path))}: {_reason(error)}"
        raise N3CError(Diagnostic("E0601", message, Span(str(path))), ExitCode.FILE) from None
    return _decoded(data, str(path), most)


def read_stdin(most: int = MAX_BYTES) -> str:
    """Read UTF-8 text from standard input; N3CError as `read_text`."""
    return _decoded(sys.stdin.buffer.read(most + 1), "<stdin>", most)


def _decoded(data: bytes, file: str, most: int) -> str:
    if len(data) > most:
        message = f"larger than {most >> 20} MiB: not a spec or a configuration"
        raise N3CError(Diagnostic("E0100", message, Span(file)), ExitCode.SPEC)
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        good = Text(data[: error.start].decode("utf-8") + "\ufffd", file)
        span = good.span(len(good.text) - 1, len(good.text))
        message = f"not UTF-8: byte 0x{data[error.start]:02x}"
        raise N3CError(Diagnostic("E0100", message, span), ExitCode.SPEC) from None


def output_file(given: Path | str | None) -> Path | None:
    """Return the file that a user names for a text; None for standard output: no name, or `-`."""
    return None if given is None or str(given) == STDOUT else Path(given)


def require_folder_name(out: Path) -> None:
    """Raise N3CError (E0612, FILE) where an output that is a folder is to be standard output."""
    if output_file(out) is None:
        diagnostic = Diagnostic("E0612", "standard output takes no folder", Span(str(out)), help="name a folder")
        raise N3CError(diagnostic, ExitCode.FILE)


def require_new(path: Path, *sources: Path | None, force: bool = False) -> None:
    """Raise N3CError (E0602, FILE) before any work where writing `path` would lose a file.

    A folder is never replaced, nor one of `sources`, which are read, nor what is in a source that is a folder; a file
    or a link that is there only with `force`. A device or a pipe, as /dev/stdout, has nothing to lose. `-` is no name.
    """
    if str(path) == STDOUT:
        raise _not_written(path, "standard output takes no such file", "name a file, or /dev/stdout")
    try:
        there = path.exists()
        if there and not path.is_file() and not path.is_dir():
            return
        if path.is_dir():
            raise _not_written(path, "Is a directory", "name a file")
        for source in sources if there else ():
            if source is not None and source.exists() and path.samefile(source):
                raise _not_written(path, "it is the file that is read", "choose another name")
            if source is not None and source.is_dir() and path.resolve().is_relative_to(source.resolve()):
                raise _not_written(path, f"it is in {shown(str(source))}, which is read", "choose another name")
        if (there or path.is_symlink()) and not force:
            kind = "a link" if path.is_symlink() else "a file"
            raise _not_written(path, f"{kind} of that name is there", "--force overwrites it")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _not_written(path, _reason(error)) from None


def _not_written(path: Path, reason: str, help: str | None = None) -> N3CError:
    message = f"cannot write {shown(str(path))}: {reason}"
    return N3CError(Diagnostic("E0602", message, Span(str(path)), help=help), ExitCode.FILE)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises N3CError (FILE) where it cannot be written."""
    import tempfile  # slow to import, and reading does not need it

    try:
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        if path.exists() and not path.is_file():  # a device or a pipe, as /dev/stdout: to be written, never replaced
            path.write_text(text, encoding="utf-8")
            return
        target = path.resolve()  # a link stays a link
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.n3c-") as folder:
            file = Path(folder) / "text"  # made as any new file, with the permissions of the umask
            file.write_text(text, encoding="utf-8")
            file.replace(target)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise _not_written(path, _reason(error)) from None
