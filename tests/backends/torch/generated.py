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

from n3c.backends.torch.emit import TRAINER, emit
from n3c.specs.blocks import Attention, Mamba, Mlp, Moe
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Model, Mtp, Spec
from support.modules import import_file

SHA256 = "0123456789abcdef" * 4


def load_module(text: str, folder: Path) -> Any:
    """Write generated code to `folder` and import it."""
    path = folder / "model.py"
    path.write_text(text)
    return import_file(path)


def generate(spec: Spec, folder: Path) -> Any:
    return load_module(emit(spec, SHA256)["model.py"], folder)


def write_generated(spec: Spec, folder: Path) -> None:
    for name, text in emit(spec, SHA256, (1000, 10)).items():
        (folder / name).write_text(text)


@contextmanager
def imported(folder: Path) -> Generator[SimpleNamespace]:
    """Import model.py, the trainer's files and numerics.py, for a while; signals are put back as they were."""
    names = [
        name.removesuffix(".py")
        for name in ("model.py", *TRAINER, "numerics.py", "blackwell.py")
        if (folder / name).exists()
    ]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.path.insert(0, str(folder))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
