"""Surviving SIGKILL: what of a result is already on the disk, and the working directory that says so.

    .OUT.n3c-quantize/state/plan.json           what is being made, and from what
    .OUT.n3c-quantize/state/part-1-of-4.jsonl   a line each time some weights are safely on the disk
    .OUT.n3c-quantize/result/                   shards, and in the end everything else; renamed to OUT last

A line is written after fsync of the data that it speaks of, and a torn last line is ignored; so whatever
the lines say is true after a crash of the process or of the machine, and all else is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from n3c.ir.diagnostics import N3CError

from .checkpoint import file_error

PLAN = "plan.json"


@dataclass(slots=True)
class Done:
    """What is on the disk of one shard: its first `weights`, with what packing each cost."""

    weights: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


class WorkDirectory:
    """The directory beside the output in which it is made."""

    def __init__(self, out: Path) -> None:
        real = out.resolve()
        self.out = real
        self.folder = real.with_name(f".{real.name}.n3c-quantize")
        self.state = self.folder / "state"
        self.result = self.folder / "result"

    def claim(self, plan: Mapping[str, Any], *, resume: bool, shared: bool) -> None:
        """Make the directory, or take up what an interrupted run of the same plan left.

        `shared`: other parts may be at work in it. N3CError where there is one that this run must not touch.
        """
        found = self._plan()
        if found is None:
            if self.folder.exists() and not shared:
                shutil.rmtree(self.folder)  # killed before it had a plan: nothing in it is of use
            self.state.mkdir(parents=True, exist_ok=True)
            self.result.mkdir(exist_ok=True)
            temporary = self.state / f".{PLAN}.{os.getpid()}"
            temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")
            with temporary.open("rb") as file:
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
            return json.loads((self.state / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def done(self, sizes: Mapping[str, int]) -> dict[str, Done]:
        """Return what all parts have on the disk: shard → Done. `sizes` are the shards' sizes when complete."""
        found: dict[str, Done] = {name: Done() for name in sizes}
        for path in sorted(self.state.glob("part-*.jsonl")):
            for line in _whole_lines(path):
                shard = found.get(line["shard"])
                if shard is not None and line["weights"] > shard.weights:
                    shard.weights = line["weights"]
                    shard.figures |= line["figures"]
        for name, shard in found.items():
            file = self.result / name
            if shard.weights and (not file.is_file() or file.stat().st_size != sizes[name]):
                found[name] = Done()  # somebody has removed or cut it
        return found

    @contextmanager
    def journal(self, part: tuple[int, int], resume: bool) -> Iterator[Journal]:
        """Open this part's journal, under a lock that ends with the process."""
        path = self.state / f"part-{part[0]}-of-{part[1]}.jsonl"
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                _lock(file.fileno(), path, self.out)
                if file.tell() and not resume:
                    message = f"part {part[0]} of {part[1]} was begun already"
                    raise file_error("E0617", message, self.out, "add --resume to continue it")
                file.write(b"\n")  # ends a line that a crash tore
                yield Journal(file.fileno())
        except N3CError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            help_ = f"make space and run again with --resume; what is done is kept in {self.folder}"
            raise file_error("E0613", f"writing the output failed: {reason}", self.out, help_) from error

    def finish(self) -> None:
        """Rename the result to the output, and clear up."""
        _sync(self.result)
        self.result.rename(self.out)
        _sync(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the directory and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Journal:
    """The lines of one part."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, shard: str, weights: int, figures: Mapping[str, list[float]]) -> None:
        """Say that the first `weights` of `shard` are on the disk; call it after fsync of the shard."""
        line = json.dumps({"shard": shard, "weights": weights, "figures": figures})
        os.write(self._descriptor, line.encode() + b"\n")
        os.fsync(self._descriptor)


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def _lock(descriptor: int, path: Path, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"another process is at work on {path.stem.replace('-', ' ')}"
        raise file_error("E0617", message, out, "wait for it to end") from error
    except OSError:  # some network file systems have no locks: then one part must not be started twice
        return


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
