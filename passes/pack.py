"""pack: bind codes of types that a GPU lacks as bytes, for spellings that decode them by tables.

Pattern: a parameter in FP4 becomes i8 of half the width (two codes a byte, the low nibble first), one
in FP8 i8 of the same shape: the same bytes of the checkpoint. States stay as they are. After fuse_moe,
which tells the codes of experts by their type; before cleanup.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from n3c.ir.formats import as_bytes
from n3c.ir.program import Program
from n3c.ir.types import DType

CODES = (DType.F4E2M1, DType.F8E4M3)
"""Types that can be bound as bytes."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Codes as bytes where the target has no such type."""

    name: ClassVar[str] = "pack"

    lacking: frozenset[DType] = frozenset()
    """Types that the target lacks: f4e2m1, f8e4m3, none or both."""

    def run(self, program: Program) -> bool:
        """Rewrite formals and parameters of the types `lacking`; return whether there are any."""
        changed = False
        for function in program.functions.values():
            for formal in function.parameters:
                if formal.type.dtype in self.lacking:
                    formal.type = as_bytes(formal.type)
                    changed = True
        for name, old in program.parameters.items():
            if old.type.dtype in self.lacking:
                program.parameters[name] = replace(old.as_bytes(), origin=old.origin.by(self.name))
                changed = True
        return changed
