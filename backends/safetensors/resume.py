"""Surviving SIGKILL: what of a result is already on the disk, and the working directory that says so.

    .OUT.n3c-quantize/state/plan.json           what is being made, and from what
    .OUT.n3c-quantize/state/part-1-of-4.jsonl   a line each time some weights are safely on the disk
    .OUT.n3c-quantize/state/part-1-of-4.lock    held while that part is made; of a whole run part-1-of-1.lock
    .OUT.n3c-quantize/result/                   shards, and in the end everything else; renamed to OUT last
    .OUT.n3c-lock                               held for moments: to begin, and to rename and clear up

A line is written after fsync of the data that it speaks of, and a torn or damaged line is ignored; so whatever
the lines say is true after a crash of the process or of the machine, and all else is made again.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from n3c.backends.locks import HeldError, locked, output_lock
from n3c.ir.diagnostics import N3CError
from n3c.ir.json_file import is_count, parse_json, read_bounded, read_json

from .checkpoint import file_error
from .layout import KEEP, Shard

PLAN = "plan.json"
_MAX_JOURNAL = 1 << 28
"""Bytes; a line with three figures for each weight of a 550B checkpoint makes a tenth."""
_FIGURES = 3
"""What packing a weight cost: signal, noise, and the noise of the other block."""


@dataclass(slots=True)
class Done:
    """What is on the disk of one shard: its first `weights`, with what packing each cost."""

    weights: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


class WorkDirectory:
    """The directory beside the output in which it is made. `waiting` hears that another process is waited for.

    N3CError (E0612) where the output's path is a loop of links.
    """

    def __init__(self, out: Path, waiting: Callable[[str], None] = lambda _: None) -> None:
        try:
            self.out = out.resolve()
        except RuntimeError as error:
            raise file_error("E0612", "the output cannot be written: a loop of links", out) from error
        self.folder = self.out.with_name(f".{self.out.name}.n3c-quantize")
        self.state = self.folder / "state"
        self.result = self.folder / "result"
        self._waiting = waiting
        self._part = ExitStack()
        """Holds the lock of the part that this process makes."""

    @contextmanager
    def claimed(self, plan: Mapping[str, Any], part: tuple[int, int], *, resume: bool) -> Iterator[None]:
        """Make the directory, or take up what an interrupted run of the same plan left; inside, it is this process's.

        Other parts of the same division may be at work in it, too, where this is one. N3CError where somebody
        else is, or where there is an output or a directory that this run must not touch.
        """
        with self._part:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                with self._alone():
                    require_new(self.out)
                    self._refuse_at_work(part)
                    self._take(plan, resume=resume, shared=part != (1, 1))
                    self._part.enter_context(locked(self._lock(part)))
            except OSError as error:
                message = f"the output cannot be written: {error.strerror or error}"
                raise file_error("E0612", message, self.out) from error
            yield

    def _alone(self) -> AbstractContextManager[None]:
        """Keep other processes from beginning and ending anything at this output."""
        return locked(output_lock(self.out), lambda: self._waiting(f"waiting for another process at {self.out}"))

    def _lock(self, part: tuple[int, int]) -> Path:
        return self.state / f"part-{part[0]}-of-{part[1]}.lock"

    def _refuse_at_work(self, part: tuple[int, int]) -> None:
        """Raise N3CError where a process makes shards that this one would make, too."""
        for path in sorted(self.state.glob("part-*.lock")):
            numbers = re.fullmatch(r"part-(\d+)-of-(\d+)", path.stem)
            if numbers is None or (int(numbers[2]) == part[1] and int(numbers[1]) != part[0]):
                continue
            try:
                with locked(path):
                    pass  # left by a process that was killed
            except HeldError as error:
                what = "this output" if numbers[2] == "1" else path.stem.replace("-", " ")
                message = f"another process is at work on {what}"
                raise file_error("E0617", message, self.out, "wait for it to end") from error

    def _take(self, plan: Mapping[str, Any], *, resume: bool, shared: bool) -> None:
        found = self._plan()
        if found is None:
            if self.folder.exists() and not shared:
                shutil.rmtree(self.folder)  # killed before it had a plan: nothing in it is of use
            self.state.mkdir(parents=True, exist_ok=True)
            self.result.mkdir(exist_ok=True)
            temporary = self.state / f".{PLAN}.{os.getpid()}"
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(plan, indent=1))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.state / PLAN)
            return
        if found != plan:
            message = "an interrupted run of this output had another checkpoint, spec or options"
            raise file_error("E0617", message, self.out, f"run it with those and --resume, or remove {self.folder}")
        if not resume and not shared:
            message = "an interrupted run of this output is there"
            raise file_error("E0617", message, self.out, f"add --resume to continue it, or remove {self.folder}")

    def _plan(self) -> Any:
        try:
            return read_json(self.state / PLAN)
        except (OSError, ValueError):
            return None

    def done(self, shards: Sequence[Shard]) -> dict[str, Done]:
        """Return what all parts have on the disk: file of a shard → Done; nothing of a shard that is damaged."""
        found: dict[str, Done] = {shard.file: Done() for shard in shards}
        for path in sorted(self.state.glob("part-*.jsonl")):
            for line in _whole_lines(path):
                done = found.get(line.shard)
                if done is not None and line.weights > done.weights:
                    done.weights = line.weights
                    done.figures |= line.figures
        return {shard.file: self._believed(shard, found[shard.file]) for shard in shards}

    def _believed(self, shard: Shard, done: Done) -> Done:
        """Return `done`, or nothing where somebody has removed or cut the shard, or a line that speaks of it."""
        file = self.result / shard.file
        packed = [weight.name for weight in shard.weights[: done.weights] if weight.format != KEEP]
        told = done.weights <= len(shard.weights) and all(name in done.figures for name in packed)
        return done if told and file.is_file() and file.stat().st_size == shard.size else Done()

    @contextmanager
    def journal(self, part: tuple[int, int], resume: bool) -> Iterator[Journal]:
        """Open this part's journal."""
        path = self.state / f"part-{part[0]}-of-{part[1]}.jsonl"
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                if file.tell() and not resume:
                    message = f"part {part[0]} of {part[1]} was begun already"
                    raise file_error("E0617", message, self.out, "add --resume to continue it")
                file.write(b"\n")  # ends a line that a crash tore
                yield Journal(file)
        except N3CError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            help_ = f"make space and run again with --resume; what is done is kept in {self.folder}"
            raise file_error("E0613", f"writing the output failed: {reason}", self.out, help_) from error

    def finish(self) -> None:
        """Rename the result to the output, and clear up. N3CError where somebody has put something in its place."""
        _sync(self.result)
        with self._alone():
            require_new(self.out, f"run again with --resume; what is done is kept in {self.folder}")
            if _is_working_directory(self.out):  # who stands in it stays in it; what names the shards comes last
                for path in sorted(self.result.iterdir(), key=lambda path: path.suffix == ".json"):
                    path.rename(self.out / path.name)
            else:
                if self.out.is_dir():
                    self.out.rmdir()
                self.result.rename(self.out)
            _sync(self.out.parent)
            self._remove()

    def discard(self) -> None:
        """Remove the directory and all in it."""
        with self._alone():
            self._remove()

    def clear(self) -> None:
        """Remove what a run left that was killed when its output was in place already."""
        if self.folder.exists():
            with suppress(N3CError, OSError), self._alone():
                self._refuse_at_work((1, 1))
                self._remove()

    def _remove(self) -> None:
        self._part.close()  # its file is in there, and Windows removes no open files
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_working_directory(path: Path) -> bool:
    try:
        return path.samefile(Path.cwd())
    except OSError:  # it is not there
        return False


def require_new(out: Path, help: str = "choose another -o") -> None:
    """Raise N3CError where the output is there already, but for an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise file_error("E0611", "the output is there already; it is left as it is", out, help)


class Journal:
    """The lines of one part."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, shard: str, weights: int, figures: Mapping[str, list[float]]) -> None:
        """Say that the first `weights` of `shard` are on the disk; call it after fsync of the shard."""
        line = json.dumps({"shard": shard, "weights": weights, "figures": figures})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@dataclass(frozen=True, slots=True)
class _Line:
    shard: str
    weights: int
    figures: dict[str, list[float]]


def _whole_lines(path: Path) -> Iterator[_Line]:
    try:
        texts = read_bounded(path, _MAX_JOURNAL).split(b"\n")
    except ValueError:  # nothing of it can be believed
        return
    for text in texts:
        try:
            line = _parsed(parse_json(text))
        except ValueError:
            continue
        if line is not None:
            yield line


def _parsed(data: object) -> _Line | None:
    """Return what a line of a journal says; None where it is none that `Journal` writes."""
    if not isinstance(data, dict):
        return None
    line = cast("dict[str, Any]", data)
    shard, weights, figures = line.get("shard"), line.get("weights"), line.get("figures")
    if not isinstance(shard, str) or not is_count(weights) or not isinstance(figures, dict):
        return None
    rows = cast("dict[str, object]", figures)
    if not all(_are_figures(row) for row in rows.values()):
        return None
    return _Line(shard, cast("int", weights), cast("dict[str, list[float]]", rows))


def _are_figures(row: object) -> bool:
    numbers = cast("list[object]", row) if isinstance(row, list) else []
    return len(numbers) == _FIGURES and all(isinstance(n, float) and math.isfinite(n) for n in numbers)


def _sync(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and needs no such call
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
