"""The generated PyTorch model of a spec with the weights of one part in memory at a time."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.specs.dump import dump_spec
from n3c.specs.schema import Spec

from .float_tensors import read_float

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

BATCH_TOKENS = 4096
"""Most tokens that a part computes at once: bounds the memory of activations inside a block."""


class StreamedModel:
    """A generated model on the meta device; `loaded` gives a part its float32 weights for a while."""

    def __init__(self, spec: Spec, checkpoint: Checkpoint) -> None:
        import torch

        self.spec = spec
        self.checkpoint = checkpoint
        self.generated = self.generate(spec)
        with _compiler_cache_that_goes(), torch.device("meta"):
            self.model: Any = self.generated.Model()
        self.model.requires_grad_(False)
        self.model.eval()

    @staticmethod
    def generate(spec: Spec, parts: Sequence[str] = ()) -> Any:
        """Import the generated package of `spec`, with some `parts` that it does not import by itself."""
        return load_package(emit(spec, hashlib.sha256(dump_spec(spec).encode()).hexdigest()), parts)

    @property
    def blocks(self) -> list[str]:
        """The names of the residual blocks, in order."""
        return [f"backbone.layers.{i}" for i in range(len(self.spec.model.pattern))]

    @contextmanager
    def loaded(self, *names: str) -> Iterator[list[Any]]:
        """Fill parts of the model, by name; N3CError (exit code 6) where the checkpoint does not fit them."""
        parts = [self.model.get_submodule(name) for name in names]
        try:
            for name, part in zip(names, parts, strict=True):
                self._fill(name, part)
            yield parts
        finally:
            for part in parts:
                part.to(device="meta")

    def _fill(self, name: str, part: Module) -> None:
        import torch

        part.to_empty(device="cpu")
        tensors: dict[str, Tensor] = self.generated.named_tensors(part)
        with torch.no_grad():
            for inner, tensor in tensors.items():
                tensor.copy_(read_float(self.checkpoint, f"{name}.{inner}", tuple(tensor.shape)))

    @contextmanager
    def experts_reading(self, read: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Give routed experts `read(x, weight)` in place of their inputs x [tokens, in] while inside.

        `weight` [E, out, in] is that of the projection which reads. A model without experts is left as it is.
        """
        module = self.generated.model  # of the package, which calls `grouped_linear`
        original = getattr(module, "grouped_linear", None)
        if original is None:
            yield
            return

        def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
            y: Tensor = original(read(x, weight), weight, counts)
            return y

        module.grouped_linear = grouped_linear
        try:
            yield
        finally:
            module.grouped_linear = original

    @property
    def head_parts(self) -> tuple[str, ...]:
        """The parts that logits need, from the output of the last block on."""
        head = "backbone.embeddings" if self.spec.model.tie_word_embeddings else "lm_head"
        return ("backbone.norm_f", head)


def batches(ids: Tensor, tokens: int | None = None) -> list[slice]:
    """Return slices of the sequences of `ids` [N, L], each of at most `tokens` (BATCH_TOKENS) or one sequence."""
    size = max(1, (tokens or BATCH_TOKENS) // ids.shape[1])
    return [slice(start, start + size) for start in range(0, len(ids), size)]


@contextmanager
def _compiler_cache_that_goes() -> Iterator[None]:
    """Give PyTorch's compiler a folder for its cache that is removed again, unless the user has named one.

    The first tensor on the meta device loads the compiler, which then makes the folder; nothing is compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
            yield
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
