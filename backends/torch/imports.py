"""What generated code imports from its own package."""

from __future__ import annotations

from collections.abc import Sequence

from n3c.specs.block_kind import BlockKind


def model_imports(blocks: Sequence[BlockKind], *, mtp: bool) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (module of the package, names that model.py imports from it), in isort's order.

    `blocks` are the kinds that the model has, `mtp` is whether it predicts several tokens.
    """
    with_mtp = ("combined_loss",) if mtp else ()
    needed = {
        "float32": {"widened"},
        "loss": {"IGNORED", "check_labels", "cross_entropy", "linear_cross_entropy", "targets_of", *with_mtp},
        "norm": {"RMSNorm"},
        "recompute": {"Recomputable", "recompute"},
        "sequences": {"WHOLE", "Batch", "arranged", "batch_of", "restored"},
        "state": {"State", "state_of"},
    }
    for kind in blocks:
        for module, names in kind.imports.items():
            needed.setdefault(module, set()).update(names)
    return tuple((module, tuple(sorted(names, key=import_order))) for module, names in sorted(needed.items()))


def import_order(name: str) -> tuple[bool, bool, str]:
    """Return the key that sorts names as isort: constants, classes, functions."""
    return not name.isupper(), not name[0].isupper(), name
