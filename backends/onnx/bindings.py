"""Bindings: the inputs and outputs of an engine, which are the rows of bindings.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
