"""Plans that were built before, by the content that they were built from.

The same graph, TensorRT, flags and GPUs give the same plan, so an entry is called by their hash. It is one file that
comes by a rename, whole or not at all: builds at the same time need not know of each other, and of two that make the
same entry the later one stays. What is damaged is told by its own hash, and removed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from n3c.backends.locks import HeldError, locked

from . import build, log
from .build import PlanResult, Range
from .targets import Flavour

CACHE_BYTES = 4 * 10**9
"""How large the cache may become unless told otherwise: several builds of large models with every entry point."""
_PIECE = 1 << 20
_ABANDONED = 24 * 3600.0
"""Seconds after which a half-written entry is one of a process that was killed."""


def plan_key(graph: bytes, flavour: Flavour, version: str, sms: Sequence[int], ranges: Mapping[str, Range]) -> str:
    """Return the name of the entry of the plan that TensorRT makes of `graph`, a serialised model without weights.

    How it is asked to, n3c's own modules say: their text is part of the name, so that no flag can be forgotten here.
    """
    asked = {"trt": [flavour, version], "sms": list(sms), "ranges": dict(ranges)}
    texts = [json.dumps(asked, sort_keys=True), *(inspect.getsource(module) for module in (build, log))]
    return hashlib.sha256("\n".join(texts).encode() + graph).hexdigest()


class PlanCache:
    """A folder of at most `limit` bytes of plans: those that were not used for longest go."""

    def __init__(self, folder: Path, limit: int = CACHE_BYTES) -> None:
        """OSError where nothing can be written to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(folder))
        self._folder, self._limit = folder, limit

    def take(self, key: str, plan: Path) -> PlanResult | None:
        """Write the plan of `key` to the file `plan`; None where there is none that is whole.

        OSError where `plan` cannot be written.
        """
        entry = self._folder / key
        try:
            file = entry.open("rb")
        except OSError:
            return None
        with file:
            digest, heading = file.readline(100).strip(), file.readline()
            computed = hashlib.sha256(heading)
            with plan.open("wb") as written:
                while piece := file.read(_PIECE):
                    computed.update(piece)
                    written.write(piece)
        if computed.hexdigest().encode() != digest:
            plan.unlink()
            _remove(entry)
            return None
        with suppress(OSError):
            os.utime(entry)
        said = cast("Mapping[str, Any]", json.loads(heading))
        return PlanResult(plan, plan.stat().st_size, said["listing"], said["scratch_bytes"])

    def keep(self, key: str, built: PlanResult) -> None:
        """Keep a plan that was built, unless it is larger than the cache may be; OSError where it cannot be written."""
        if built.bytes > self._limit:
            return
        heading = json.dumps({"listing": built.listing, "scratch_bytes": built.scratch_bytes}).encode() + b"\n"
        computed = hashlib.sha256(heading)
        half = self._folder / f".{key}.{os.getpid()}"
        try:
            with half.open("wb") as file, built.path.open("rb") as plan:
                file.write(bytes(2 * computed.digest_size) + b"\n" + heading)
                while piece := plan.read(_PIECE):
                    computed.update(piece)
                    file.write(piece)
                file.seek(0)
                file.write(computed.hexdigest().encode())
            half.replace(self._folder / key)
        finally:
            _remove(half)
        self._trim()

    def _trim(self) -> None:
        """Remove what was not used for longest, until the rest is small enough; nothing where another process does."""
        with suppress(HeldError), locked(self._folder / ".lock"):
            found: list[tuple[float, int, Path]] = []
            for path in self._folder.iterdir():
                with suppress(OSError):  # another build has removed it
                    status = path.stat()
                    if not path.name.startswith("."):
                        found.append((status.st_mtime, status.st_size, path))
                    elif path.name != ".lock" and status.st_mtime < time.time() - _ABANDONED:
                        _remove(path)
            size = 0
            for _, bytes_, path in sorted(found, reverse=True):
                size += bytes_
                if size > self._limit:
                    _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):  # it is gone, or open elsewhere on a system that then keeps it
        path.unlink()
