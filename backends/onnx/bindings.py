"""Bindings: the inputs and outputs of an engine, which are the rows of bindings.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import is_count, read_json
from n3c.ir.types import DType

FILE = "bindings.json"
BYTES = ".bytes"
"""Behind the name of a parameter: its memory bound as bytes, for what gathers codes or decodes them by tables."""
_DTYPES = tuple(dtype.value for dtype in DType)
_ENTRY = re.compile(r"[a-z_]+\.b[1-9][0-9]{0,8}(\.s[0-9]{1,4})?")
"""`decode.b4`, or `decode.b4.s0` of a stage."""
_ONNX = re.compile(r"onnx/[a-z_]+(\.b[0-9]+)?(\.s[0-9]+)?\.onnx")
_MAX_DIM = 1 << 40


def parameter_of(name: str) -> str:
    """Return the name of the parameter whose memory the input `name` is, as it is stored or as bytes."""
    return name.removesuffix(BYTES)


@dataclass(frozen=True, slots=True)
class Binding:
    """An engine input or output."""

    name: str
    kind: str
    """`input`, `state`, `weight`, `output`, or `view`: the very memory of the state `source` in another type."""
    dtype: str
    """As in IR text: f32, bf16, f8e4m3, f4e2m1 (two a byte, the first in the low nibble), i8, i64."""
    shape: tuple[int, ...]
    """-1 where a length is chosen at every call."""
    source: str
    """Of weights the expression over checkpoint tensors; of a next state the state that it replaces."""
    memory: str = ""
    """Of weights: equal for those that are the same bytes, bound as different types."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of bindings.json."""
        return {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "source": self.source,
            **({"memory": self.memory} if self.memory else {}),
        }


@dataclass(frozen=True, slots=True)
class EntryBindings:
    """The engine of one entry point, batch size and stage."""

    onnx: str
    """Its graph, a path below the build."""
    stage: int | None
    """None: the build is of one stage."""
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    weights: tuple[Binding, ...]


@dataclass(frozen=True, slots=True)
class Bindings:
    """What stands in bindings.json."""

    weights_mode: str
    entries: Mapping[str, EntryBindings]
    """`decode.b4`, or `decode.b4.s0` of a stage → its engine."""


def read_bindings(path: Path) -> Bindings:
    """Return what a bindings.json says; N3CError (E0640, exit code 6) where it is not as `n3c build` writes it."""
    try:
        return _parsed(cast("Any", read_json(path)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not one that `n3c build` wrote"
        message = f"the bindings cannot be read: {reason}"
        raise N3CError(Diagnostic("E0640", message, Span(str(path)), help="build it again"), ExitCode.FILE) from error


def _parsed(data: Mapping[str, Any]) -> Bindings:
    """Raises KeyError, TypeError, AttributeError or ValueError where `data` is not what a build writes."""
    mode = data["weights_mode"]
    _require(data["schema"] == 1 and mode in ("bound", "embedded"))
    weights = {row["name"]: _binding(row, ("weight",)) for row in data["weights"]}
    entries: dict[str, EntryBindings] = {}
    for key, row in data["entries"].items():
        onnx, stage = row["onnx"], row["stage"]
        _require(_ENTRY.fullmatch(key) and _ONNX.fullmatch(onnx))
        _require(stage is None or is_count(stage, 9999))
        inputs = tuple(_binding(each, ("input", "state", "view")) for each in row["inputs"])
        outputs = tuple(_binding(each, ("output", "state")) for each in row["outputs"])
        entries[key] = EntryBindings(onnx, stage, inputs, outputs, tuple(weights[name] for name in row["weights"]))
    return Bindings(mode, entries)


def _binding(row: Mapping[str, Any], kinds: tuple[str, ...]) -> Binding:
    texts = (row["name"], row["kind"], row["dtype"], row["source"], row.get("memory", ""))
    _require(all(isinstance(text, str) for text in texts) and row["name"])
    _require(row["kind"] in kinds and row["dtype"] in _DTYPES and isinstance(row["shape"], list))
    _require(all(type(dim) is int and (dim == -1 or is_count(dim, _MAX_DIM)) for dim in row["shape"]))
    return Binding(*texts[:3], tuple(row["shape"]), *texts[3:])


def _require(holds: object) -> None:
    if not holds:
        raise ValueError("not as written")
