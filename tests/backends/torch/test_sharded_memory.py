"""What a sharded run under autocast keeps of its weights from the forward to the backward pass: one process, gloo."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from .generated import imported, tiny_spec, write_generated


@pytest.fixture(scope="module", params=[32, None], ids=["latent", "wide"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import a generated program with experts, Mamba-2, attention and two MTP steps; join a process group of one."""
    folder = tmp_path_factory.mktemp("sharded")
    write_generated(tiny_spec("ME*-", latent_size=request.param), folder)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        with imported(folder) as modules:
            yield modules
    finally:
        dist.destroy_process_group()


def sharded(program: Any, autocast: bool, recompute: bool = False) -> Any:
    torch.manual_seed(0)
    model = program.model.Model()
    program.parallelize.parallelize(model, program.parallelize.Meshes.over_all("cpu"), autocast=autocast)
    model.activation_checkpointing_enable(recompute)
    return model


def run(model: Any) -> tuple[Any, list[torch.Tensor]]:
    """Run the forward pass under autocast; return its output and what autograd keeps of it, uncopied."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    ids = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(0))  # no matrix has 21 rows or columns
    context = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(ids, ids)
    return out, kept


def matrices(program: Any, model: Any) -> list[nn.Parameter]:
    blocks = [*model.backbone.layers, *model.mtp.layers]
    return [weight for block in blocks for weight in program.parallelize.cast_by_autocast(block)]


def bytes_of(tensors: list[torch.Tensor], shapes: set[tuple[int, ...]]) -> int:
    """Return the bytes in memory of those tensors that have one of the shapes, or are a transpose of one."""
    either = shapes | {(*most, columns, rows) for *most, rows, columns in shapes}
    storages = [t.untyped_storage() for t in tensors if tuple(t.shape) in either]
    return sum({storage.data_ptr(): storage.size() for storage in storages}.values())


def test_no_copy_of_the_weights_is_kept(program: Any) -> None:
    """A copy of every matrix where autocast casts what was gathered, none where it is gathered in bfloat16."""
    weights = matrices(program, program.model.Model())
    shapes, whole = {tuple(weight.shape) for weight in weights}, 2 * sum(weight.numel() for weight in weights)
    out, kept = run(sharded(program, autocast=False))
    assert bytes_of(kept, shapes) >= whole
    del out, kept
    out, kept = run(sharded(program, autocast=True))
    assert bytes_of(kept, shapes) == 0
    assert any(t.dtype == torch.bfloat16 and tuple(t.shape) in shapes for t in kept)  # what is gathered anew
    out.loss.backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_same_numbers_as_autocast_alone(program: Any, recompute: bool) -> None:
    """Products have the same operands; what autocast leaves in float32 stays it, and so do sharded weights."""
    models = [sharded(program, autocast, recompute) for autocast in (False, True)]
    seen: dict[str, torch.dtype] = {}

    def look(name: str, module: nn.Module, _inputs: Any, _output: Any) -> None:
        seen.update({f"{name}.{leaf}": weight.dtype for leaf, weight in module.named_parameters(recurse=False)})

    for name, module in models[1].named_modules():
        module.register_forward_hook(partial(look, name))
    (out, _), (ours, _) = run(models[0]), run(models[1])
    assert torch.equal(ours.loss, out.loss) and torch.equal(ours.logits, out.logits)
    for result in (out, ours):
        (result.loss + 0.1 * result.balance_loss).backward()
    for (name, weight), other in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert weight.dtype == weight.grad.dtype == torch.float32
        # The two uses of a matrix of MTP are added in bfloat16.
        left, right = weight.grad.to_local(), other.grad.to_local()
        bound = 2**-7 if name.startswith("mtp.") else 0.0
        assert float((left - right).abs().max()) <= bound * float(right.abs().max()), name
    cast = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert {"backbone.layers.0.mixer.in_proj.weight", "backbone.layers.1.mixer.experts.up_proj"} <= cast
    kinds = (
        "norm.weight",
        "A_log",
        ".D",
        "bias",
        "conv1d.weight",
        "gate.weight",
        "embeddings.weight",
        "lm_head.weight",
    )
    assert not any(name.endswith(kinds) for name in cast) and all(any(n.endswith(k) for n in seen) for k in kinds)
