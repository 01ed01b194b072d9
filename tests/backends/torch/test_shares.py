"""What tensor-parallel processes share: in one process, whose peers only have a number."""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from n3c.specs.blocks import MoeLayers

from .data_files import program
from .generated import imported, tiny_spec, write_generated


@pytest.fixture
def rank() -> int:
    return 0


@contextmanager
def processes(count: int, rank: int) -> Generator[None]:
    """Join a group as one of several processes; what the others send is nothing."""
    fake: Any = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=rank, world_size=count, store=fake.FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def two_processes(rank: int) -> Iterator[None]:
    with processes(2, rank):
        yield


def test_who_works_together(tmp_path: Path) -> None:
    """Of 16 processes: tensor-parallel ones lie side by side, then those that share parameters, then their groups."""
    write_generated(tiny_spec("E", mtp=None), tmp_path)
    with imported(tmp_path) as train, processes(16, 0):
        over_all = train.parallelize.Meshes.over_all
        meshes = over_all("cpu", tensor=2, replicate=2, expert=4)
        assert meshes.tensor.mesh.tolist() == [0, 1]
        assert meshes.data.mesh.tolist() == list(range(0, 16, 2))
        assert meshes.shards.mesh.tolist() == [[0, 2, 4, 6], [8, 10, 12, 14]]
        assert meshes.expert.mesh_dim_names == ("replica", "expert", "tensor")
        assert meshes.expert.mesh.tolist() == torch.arange(16).view(2, 4, 2).tolist()
        alone = over_all("cpu")
        assert alone.tensor is alone.expert is None
        assert alone.data.mesh.tolist() == alone.shards.mesh.tolist() == list(range(16))
        with pytest.raises(ValueError, match=r"^8 data processes do not divide into 3 groups$"):
            over_all("cpu", tensor=2, replicate=3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("two_processes")
def test_a_process_computes_with_its_half_of_the_vocabulary(rank: int, tmp_path: Path) -> None:
    """Embeddings of the others' tokens are zeros, and so are their losses: a sum over processes has them all."""
    with program(tmp_path, 256) as train:
        model, parallelize = train.model.Model(), train.parallelize
        embedding, head = model.backbone.embeddings, model.lm_head
        rows, columns = embedding.weight.data.clone(), head.weight.data[128 * rank : 128 * (rank + 1)].clone()
        meshes = parallelize.Meshes.over_all("cpu", tensor=2)
        ids = torch.tensor([[0, 127, 128, 255]])
        own = ids // 128 == rank
        share = parallelize.share_of("backbone.embeddings", embedding, model.config, meshes)
        torch.testing.assert_close(share(ids), rows[ids] * own[..., None], rtol=0, atol=0)
        share = parallelize.share_of("lm_head", head, model.config, meshes)
        x = torch.randn(1, 4, 64)
        logits = (x @ columns.T)[own].repeat(1, 2)  # what is gathered of the other process is a copy
        losses = F.cross_entropy(logits, ids[own] - 128 * rank, reduction="sum")
        torch.testing.assert_close(share(x, ids), losses)


@pytest.mark.parametrize(("pattern", "count", "modules"), [("M*-E", 2, 5), ("*", 4, 1)])
def test_the_shares_of_a_block_sum_to_it(
    pattern: str, count: int, modules: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What processes compute, and the gradients of what they read, are added up by hand: no other one answers.

    Of four processes two have the queries of one key head each.
    """
    write_generated(tiny_spec(pattern, mtp=None), tmp_path)
    with imported(tmp_path) as train:
        torch.manual_seed(0)
        model, parallelize = train.model.Model(), train.parallelize
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x, chosen = torch.randn(2, 20, 64), torch.randint(8, (2, 20, 3))
        experts = (x[..., :32], chosen, torch.rand(2, 20, 3))
        inputs = {"Mamba2": (x,), "Attention": (x,), "MLP": (x,), "Experts": experts}
        blocks = {name: module for name, module in model.named_modules() if type(module).__name__ in inputs}
        assert len(blocks) == modules  # with the shared expert
        wholes = dict[int, torch.Tensor]()

        def full(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
            return wholes[id(tensor)]

        monkeypatch.setattr(parallelize.DTensor, "full_tensor", full)

        def values(computes: Any, module: torch.nn.Module) -> torch.Tensor:
            read, *others = inputs[type(module).__name__]
            read = read.detach().clone().requires_grad_()
            y = computes(read, *others)
            y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
            assert read.grad is not None
            return torch.cat([y.detach(), read.grad])

        whole = {name: values(block, block) for name, block in blocks.items()}
        for rank in range(count):
            with processes(count, rank):
                meshes = parallelize.Meshes.over_all("cpu", tensor=count)
                for name, block in blocks.items():
                    cut = deepcopy(block)
                    share = parallelize.share_of(name, cut, model.config, meshes)
                    wholes |= {id(p): block.get_parameter(n).detach() for n, p in cut.named_parameters()}
                    whole[name] -= values(share, block)
        for name, left in whole.items():
            torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize(("norm", "factor"), [(0.0, 1.0), (0.25, 1.0), (0.5, 1.0), (1.0, 0.5), (4.0, 0.125)])
def test_gradients_are_clipped_and_small_ones_stay(norm: float, factor: float, tmp_path: Path) -> None:
    with program(tmp_path) as train:
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([0.6, -0.8]) * norm
        assert train.parallelize.clip_gradients([parameter, torch.nn.Parameter(torch.zeros(1))], 0.5) == norm
        torch.testing.assert_close(parameter.grad, torch.tensor([0.6, -0.8]) * norm * factor, rtol=1e-5, atol=0)
        assert train.trainer.clip_factor is train.parallelize.clip_factor  # SplitAdamW's, too
        assert train.parallelize.clip_factor(torch.zeros(()), 0.5) == 1


@pytest.mark.parametrize(("vocabulary", "shared"), [(256, True), (257, False)])
@pytest.mark.usefixtures("two_processes")
def test_a_vocabulary_is_shared_where_it_divides(vocabulary: int, shared: bool, tmp_path: Path) -> None:
    """Each process has half of the rows of embedding and head, or all of them."""
    with program(tmp_path, vocabulary) as train:
        model, parallelize = train.model.Model(), train.parallelize
        meshes = parallelize.Meshes.over_all("cpu", tensor=2)
        for name in ("backbone.embeddings", "lm_head"):
            module = model.get_submodule(name)
            assert (parallelize.share_of(name, module, model.config, meshes) is not None) == shared
            weight = module.weight.to_local() if shared else module.weight
            assert weight.shape == (vocabulary // 2 if shared else vocabulary, 64)


def test_experts_on_processes_compute_what_they_do_on_one(tmp_path: Path) -> None:
    """Tokens that go to the experts and come back, with their gradients, in a group of one process."""
    write_generated(tiny_spec("E", mtp=None), tmp_path)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with imported(tmp_path) as train:
            config, parallelize = train.model.Config(), train.parallelize
            torch.manual_seed(0)
            experts = parallelize.Experts(config)
            for parameter in experts.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            alone = deepcopy(experts)
            mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("expert", "tensor"))
            with torch.device("meta"):
                share = parallelize.ExpertShare(experts, parallelize.Experts(config), mesh)
            ids, weights = torch.tensor([[[0, 3, 7], [3, 1, 2]]]), torch.rand(1, 2, 3)
            found = list[torch.Tensor]()
            for computes in (share, alone):
                x = torch.linspace(-1, 1, 2 * config.moe_latent_size).view(1, 2, -1).requires_grad_()
                y = computes(x, ids, weights)
                y.square().sum().backward()
                assert x.grad is not None
                found += [y, x.grad]
            torch.testing.assert_close(found[:2], found[2:])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("experts", "fused"), [(0, True), (1, True), (2, False)])
@pytest.mark.usefixtures("two_processes")
def test_one_kernel_updates_the_parameters_of_one_mesh(experts: int, fused: bool, tmp_path: Path) -> None:
    """Experts that processes share out lie on a mesh of their own; 0: nothing is shared out."""
    write_generated(tiny_spec("E", mtp=None), tmp_path)
    with imported(tmp_path) as train:
        with torch.device("meta"):
            model = train.model.Model()
        if experts:
            train.parallelize.parallelize(model, train.parallelize.Meshes.over_all("cpu", expert=experts))
        for name in ("adamw", "muon"):
            settings = train.settings.Settings(data="d", out="o", steps=1, optimizer=name)
            assert train.optimizer.build_optimizer(model, settings).defaults["fused"] is fused


def test_the_norm_counts_each_piece_of_a_gradient_once(tmp_path: Path) -> None:
    """Of four processes each has a whole one, a half that two have, and a quarter of its own; the others' are zeros."""
    with program(tmp_path) as train, processes(4, 0):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "two"))
        cuts = ((Replicate(), Replicate()), (Shard(0), Replicate()), (Shard(0), Shard(0)))
        parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(4)]
        parameters[0].grad = torch.full((4,), 2.0)
        for parameter, placements in zip(parameters[1:], cuts, strict=True):
            local = torch.full((4,), 2.0)
            parameter.data = DTensor.from_local(torch.zeros(4), mesh, placements, run_check=False)
            parameter.grad = DTensor.from_local(local, mesh, placements, run_check=False)
        squares = 16.0 * (1 / 4 + 1 / 4 + 2 / 4 + 4 / 4)
        assert float(train.parallelize.norm_of_gradients(parameters)) == pytest.approx(squares**0.5)


class Sharded(torch.nn.Module):
    """What `fully_shard` makes of a module, as far as it is told something."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def set_gradient_divide_factor(self, factor: float) -> None:
        self.told.append(factor)

    def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
        self.told.append(enable)


AXES = {(2, 8, 3): 1, (3, 8, 4): 1, (4, 8, 3): 0, (2, 6, 4): 0, (2, 8): 0, (2,): 0, (8, 3, 3): 0}
"""Shape of a parameter → the axis along which 4 processes share it out."""


def test_along_which_axis_parameters_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, or that of the rows of fewer experts than processes; gradients are summed, and not divided."""
    cuts = dict[tuple[int, ...], Shard]()

    def fully_shard(_: object, shard_placement_fn: Any, **__: object) -> None:
        cuts.update({shape: shard_placement_fn(torch.nn.Parameter(torch.empty(shape))) for shape in AXES})

    with program(tmp_path) as train, processes(8, 0):
        monkeypatch.setattr(train.parallelize, "fully_shard", fully_shard)
        monkeypatch.setattr(train.parallelize, "FSDPModule", Sharded)
        module = Sharded()
        train.parallelize.shard(module, init_device_mesh("cpu", (2, 4)))
    assert cuts == {shape: Shard(axis) for shape, axis in AXES.items()} and module.told == [1.0, True]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("two_processes")
def test_what_processes_put_side_by_side(rank: int, tmp_path: Path) -> None:
    """On the last axis, of which each gets its own gradient; what is gathered of the other process is a copy."""
    with program(tmp_path) as train:
        collectives, group, equal = train.collectives, dist.group.WORLD, torch.testing.assert_close
        x, dy = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 8)
        y = collectives.side_by_side(x, group)
        y.backward(dy)
        equal((y, x.grad), (torch.cat([x, x], -1), dy[..., 4 * rank : 4 * rank + 4]), rtol=0, atol=0)
        logits = torch.randn(5, 6)
        expected = torch.cat([logits, logits], -1).log_softmax(-1)[:, :6]
        equal(collectives.log_softmax_over(logits.clone(), group), expected)
        x = torch.randn(2, 3, requires_grad=True)
        assert torch.equal(collectives.sum_of_gradients(x, group), x)
        total = collectives.sum_of_outputs(x, group)
        total.backward(torch.ones_like(x))
        equal((total, x.grad), (x, torch.ones_like(x)), rtol=0, atol=0)


def test_every_block_is_sharded_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just after it has its values, in float32 unless it is asked for; then what is left of the model."""
    log: list[str] = []
    write_generated(tiny_spec("M*", mtp="*"), tmp_path)
    with imported(tmp_path) as train, processes(2, 0):
        with torch.device("meta"):
            model = train.model.Model()
        names = {id(module): name or "model" for name, module in model.named_modules()}
        parallelize = train.parallelize

        def shard_block(block: torch.nn.Module, _: object, autocast: bool) -> None:
            log.append(f"shard {'cast ' if autocast else ''}block {names[id(block)]}")

        def shard(module: torch.nn.Module, *_: object) -> None:
            log.append(f"shard {names[id(module)]}")

        def fill(name: str, _: object) -> None:
            log.append(f"fill {name}")

        monkeypatch.setattr(parallelize, "shard", shard)
        monkeypatch.setattr(parallelize, "shard_block", shard_block)
        meshes = parallelize.Meshes.over_all("cpu")
        parallelize.parallelize(model, meshes, fill)
        assert [name for name, _ in parallelize.parts(model)] == [
            "backbone.embeddings", "backbone.layers.0", "backbone.layers.1", "backbone.norm_f", "lm_head",
            "mtp.layers.0",
        ]  # fmt: skip
        expected = log.copy()
        log.clear()
        parallelize.parallelize(model, meshes, autocast=True)
    cast = [line.replace("block", "cast block") for line in expected if not line.startswith("fill")]
    assert log == cast
    assert expected == [
        *("fill backbone.embeddings", "fill backbone.layers.0", "shard block backbone.layers.0"),
        *("fill backbone.layers.1", "shard block backbone.layers.1", "fill backbone.norm_f", "fill lm_head"),
        *("fill mtp.layers.0", "shard block mtp.layers.0", "shard model"),
    ]


@pytest.mark.parametrize(
    ("autocast", "rounded", "narrow"), [(False, False, False), (True, False, True), (True, True, False)]
)
@pytest.mark.usefixtures("two_processes")
def test_experts_are_gathered_as_products_take_them(
    autocast: bool, rounded: bool, narrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 under autocast, unless they have numerics of their own."""
    policies: list[object] = []
    write_generated(tiny_spec("E", mtp=None), tmp_path)
    with imported(tmp_path) as train:
        parallelize = train.parallelize

        class Rounded(parallelize.Experts):  # type: ignore[name-defined, misc]
            pass

        def numerics(part: torch.nn.Module, _: str) -> None:
            for module in part.modules():
                if isinstance(module, parallelize.Experts) and rounded:
                    module.__class__ = Rounded

        def shard(module: torch.nn.Module, _: object, policy: object = None) -> None:
            policies.extend([policy] if isinstance(module, parallelize.Experts) else [])

        monkeypatch.setattr(parallelize, "shard", shard)
        monkeypatch.setattr(parallelize, "shard_block", shard)
        with torch.device("meta"):
            model = train.model.Model()
        meshes = parallelize.Meshes.over_all("cpu", expert=2)
        parallelize.parallelize(model, meshes, numerics=numerics, autocast=autocast)
        assert policies == [parallelize.BFLOAT16 if narrow else parallelize.FLOAT32]
        assert parallelize.FLOAT32.param_dtype is None
        narrow_policy = parallelize.BFLOAT16  # gradients are summed in float32, and autocast casts what is read
        assert (narrow_policy.param_dtype, narrow_policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert narrow_policy.cast_forward_inputs is False


@pytest.mark.parametrize(("count", "wrong"), [(2, []), (3, [80, 70]), (4, [70])])
def test_sizes_of_every_layer_are_to_divide(count: int, wrong: list[int], tmp_path: Path) -> None:
    """Those in which a layer differs, too; each size is told once."""
    layers = (MoeLayers("1", shared_intermediate_size=70), MoeLayers("2", shared_intermediate_size=70))
    write_generated(tiny_spec("EEE", mtp=None, layers=layers), tmp_path)
    meshes = SimpleNamespace(tensor=SimpleNamespace(size=lambda: count), expert=None)
    with imported(tmp_path) as train:
        require, config = train.parallelize.require_divisible, train.model.Config()
        name = "moe_shared_intermediate_size"
        told = [f"{name} {size} does not divide by {count} tensor-parallel processes" for size in wrong]
        if not wrong:
            require(config, meshes)
            return
        with pytest.raises(ValueError, match=name) as error:
            require(config, meshes)
        assert [line for line in str(error.value).split("; ") if line.startswith(name)] == told
