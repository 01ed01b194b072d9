"""What the tests of the torch backend share: a small spec with every block kind, and generated modules."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package, write_files
from n3c.specs.blocks import Attention, Mamba, Mlp, Moe
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Model, Mtp, Spec

SHA256 = "0123456789abcdef" * 4

KEPT_FLOAT32 = ("dt_bias", "A_log", ".D", "e_score_correction_bias")
"""How the names of tensors end that stay float32 in every cast and export."""


def generate(spec: Spec) -> Any:
    """Return the generated package of a spec, imported."""
    return load_package(emit(spec, SHA256))


def write_generated(spec: Spec, folder: Path) -> None:
    """Write all files of a spec, as `n3c build` does."""
    write_files(emit(spec, SHA256, (1000, 10)), folder)


@contextmanager
def imported(folder: Path) -> Generator[SimpleNamespace]:
    """Import train.py and every part of its package by its own name, for a while; signals are put back as they were."""
    (package,) = (path.parent for path in folder.glob("*/__init__.py"))
    names = {path.stem: f"{package.name}.{path.stem}" for path in package.glob("[a-z]*.py")}
    names |= {path.stem: f"{package.name}.training.{path.stem}" for path in package.glob("training/[a-z]*.py")}
    names |= {"train": "train"}
    names.pop("modeling_n3c", None)  # which needs transformers
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.path.insert(0, str(folder))
    _forget(package.name)
    try:
        yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})
    finally:
        sys.path.remove(str(folder))
        _forget(package.name)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _forget(package: str) -> None:
    """Remove a package and train.py from the imported modules: others may have the same names."""
    for name in [name for name in sys.modules if name.partition(".")[0] in (package, "train")]:
        del sys.modules[name]


def tiny_spec(pattern: str = "MEM*E-ME", mtp: str | None = "*E", depth: int = 2, **moe: Any) -> Spec:
    """Return a small spec, by default with every block kind, latent experts and two MTP steps."""
    sizes: dict[str, Any] = {
        "num_experts": 8,
        "top_k": 3,
        "intermediate_size": 48,
        "shared_intermediate_size": 80,
        "latent_size": 32,
        "routed_scaling_factor": 2.5,
    }
    return Spec(
        name="tiny-test",
        model=Model(hidden_size=64, vocab_size=97, pattern=Pattern.parse(pattern), initializer_range=0.1),
        mamba=Mamba(num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=16),
        attention=Attention(num_heads=4, num_kv_heads=2, head_dim=24),
        moe=Moe(**(sizes | moe)),
        mlp=Mlp(intermediate_size=96),
        mtp=Mtp(Pattern.parse(mtp), depth, 0.3) if mtp else None,
    )
