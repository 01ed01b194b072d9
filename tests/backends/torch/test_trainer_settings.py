"""What the files for Megatron-Bridge and torchtitan ask of these is what train.py does: read with stand-ins for both.

Whether they accept it, their own code tells: test_megatron.py, test_torchtitan.py.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

from n3c.specs.load import load_spec
from n3c.specs.schema import Spec
from support.specs import SPECS
from support.stand_ins import stand_ins

from .generated import imported, write_generated


@pytest.fixture(scope="module")
def spec() -> Spec:
    """A spec with numbers of its own, and NVFP4 in training."""
    spec = load_spec(SPECS / "tiny.toml")[0]
    assert spec.training is not None and spec.training.format == "nvfp4"
    return spec


@pytest.fixture(scope="module")
def train(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The modules of train.py, and those for the other trainers: `adapter`, `recipe`, `provider`."""
    folder = tmp_path_factory.mktemp("trainers")
    write_generated(spec, folder)
    with imported(folder) as modules, stand_ins("torchtitan", "megatron"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "set_timeout", None, raising=False)
        modules.adapter = importlib.import_module("torchtitan_adapter")
        patch.setattr(modules.adapter, "IGNORE_INDEX", -100)
        modules.recipe = importlib.import_module("megatron_recipe")
        patch.setattr(modules.recipe.RecipeConfig, "from_config_dict", dict, raising=False)
        modules.provider = importlib.import_module("megatron_provider")
        yield modules
        for name in ("torchtitan_adapter", "megatron_recipe", "megatron_provider"):
            del sys.modules[name]


def defaults(train: SimpleNamespace) -> Any:
    return train.settings.Settings(data="d", out="o", steps=1000)


def test_megatron_trains_as_train_py(train: SimpleNamespace) -> None:
    """Rates, schedule, decay and clipping; Megatron counts in steps what train.py has as parts."""
    ours, steps = defaults(train), 1000
    theirs = train.recipe.pretrain_config(seq_length=512, stages=1, steps=steps)
    optimizer, scheduler = theirs.optimizer, theirs.scheduler
    assert (optimizer.lr, optimizer.min_lr) == pytest.approx((ours.lr, ours.lr * ours.final_lr))
    assert (optimizer.adam_beta1, optimizer.adam_beta2) == (ours.beta1, ours.beta2)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (ours.weight_decay, ours.clip)
    assert scheduler.start_weight_decay == scheduler.end_weight_decay == ours.weight_decay
    assert (scheduler.lr_decay_style, scheduler.lr_wsd_decay_style) == (ours.schedule.upper(), "minus_sqrt")
    assert scheduler.lr_warmup_iters == ours.warmup * steps
    assert scheduler.lr_wsd_decay_iters == ours.decay * steps
    assert scheduler.lr_decay_iters == theirs.train.train_iters == steps
    assert theirs.dataset.seq_length == theirs.model.seq_length == 512
    assert theirs.train.global_batch_size % theirs.train.micro_batch_size == 0
    assert theirs.ddp.average_in_collective is False  # the loss is a mean over the tokens of all processes
    assert theirs.model.calculate_per_token_loss is True


def test_megatron_begins_on_one_gpu(train: SimpleNamespace) -> None:
    model = train.recipe.pretrain_config(stages=1).model
    names = [name for name in vars(model) if name.endswith("_model_parallel_size") or name == "context_parallel_size"]
    assert len(names) == 4 and all(getattr(model, name) == 1 for name in names)
    assert model.expert_tensor_parallel_size == 1 and model.sequence_parallel is False


def test_megatron_rounds_as_the_spec_says(train: SimpleNamespace, spec: Spec) -> None:
    """Two-dimensional blocks, random Hadamard transforms and stochastic rounding are not disabled."""
    assert spec.training is not None and spec.training.block == (16, 16)
    assert train.recipe.pretrain_config().env_vars == {
        "NVTE_NVFP4_DISABLE_RHT": 0,
        "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": 0,
        "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": 0,
    }
    model = train.recipe.pretrain_config().model
    assert model.moe_router_padding_for_quantization is True
    matchers = model.quant_recipe["matchers"].values()
    assert matchers and all(matcher["enabled"] and matcher["type"] == "glob" for matcher in matchers)
    assert {matcher["config"] for matcher in matchers} <= set(model.quant_recipe["configs"])


def test_megatron_rounds_rows(spec: Spec, tmp_path: Path) -> None:
    assert spec.training is not None
    write_generated(replace(spec, training=replace(spec.training, block=(1, 16))), tmp_path)
    assert '"NVTE_NVFP4_DISABLE_2D_QUANTIZATION": 1,' in (tmp_path / "megatron_recipe.py").read_text()


def test_megatron_has_the_model(train: SimpleNamespace, spec: Spec) -> None:
    """The routers' bias and balance as train.py has them, no dropout, no biases, one set of MTP weights."""
    ours, model = defaults(train), train.provider.provider(512)
    assert spec.moe is not None and spec.mtp is not None
    assert (model.moe_router_bias_update_rate, model.moe_aux_loss_coeff) == (ours.bias_rate, ours.balance)
    assert model.moe_router_enable_expert_bias is True and model.moe_grouped_gemm is True
    assert (model.hidden_dropout, model.attention_dropout) == (0, 0)
    assert model.add_bias_linear is model.gated_linear_unit is model.apply_rope_fusion is False
    assert model.attention_softmax_in_fp32 is model.apply_query_key_layer_scaling is False
    assert model.moe_shared_expert_overlap is False and model.moe_permute_fusion is True
    assert model.is_hybrid_model is model.bf16 is model.mtp_use_repeated_layer is True
    assert (model.init_method_std, model.layernorm_epsilon) == (spec.model.initializer_range, spec.model.norm_eps)
    assert (model.mtp_num_layers, model.mtp_loss_scaling_factor) == (spec.mtp.depth, spec.mtp.loss_scaling_factor)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_megatron_is_cut_evenly(train: SimpleNamespace, spec: Spec, stages: int) -> None:
    """Into stages that differ by at most one layer, in the order of the layers."""
    if stages == train.provider.STAGES:
        assert train.provider.provider(512, stages).hybrid_layer_pattern == train.provider.PATTERN
    main, *steps = train.provider.cut(stages).split("/")
    parts = main.split("|")
    assert "".join(parts) == spec.model.pattern.symbols and len(parts) == stages
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert spec.mtp is not None and steps == [spec.mtp.pattern.symbols] * spec.mtp.depth


def test_torchtitan_trains_as_train_py(train: SimpleNamespace) -> None:
    ours, theirs = defaults(train), train.adapter.pretrain()
    plain, others = theirs.optimizer.param_groups
    for group, decay in ((plain, 0.0), (others, ours.weight_decay)):
        assert group.optimizer_kwargs == {
            "lr": ours.lr, "betas": (ours.beta1, ours.beta2), "eps": ours.eps, "weight_decay": decay
        }  # fmt: skip
    assert (theirs.lr_scheduler.decay_ratio, theirs.lr_scheduler.min_lr_factor) == (ours.decay, ours.final_lr)
    assert theirs.lr_scheduler.warmup_steps == ours.warmup * 10_000  # steps that torchtitan trains by default
    assert (theirs.training.local_batch_size, theirs.training.seq_len) == (ours.batch_size, ours.seq_len)
    assert theirs.training.max_norm == ours.clip and theirs.training.disable_cuda_graphs is True
    assert (theirs.checkpoint.enable, theirs.checkpoint.interval, theirs.checkpoint.keep_latest_k) == (
        True, ours.save_every, ours.keep
    )  # fmt: skip
    assert theirs.model_spec.model.nvfp4 is False and train.adapter.pretrain_nvfp4().model_spec.model.nvfp4 is True


def test_torchtitan_decays_what_train_py_decays(train: SimpleNamespace) -> None:
    plain = re.compile(train.adapter.pretrain().optimizer.param_groups[0].pattern)
    with torch.device("meta"):
        model = train.model.Model()
    settings = defaults(train)
    groups = train.optimizer.build_optimizer(model, settings).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert bool(plain.search(name)) == (id(parameter) not in decayed), name


def test_torchtitans_defaults_are_those_of_train_py(train: SimpleNamespace) -> None:
    """As far as a run begins with them that is asked for nothing."""
    ours, adapter = defaults(train), train.adapter
    model = vars_of(adapter.TitanModel.Config())
    assert model == {"seed": ours.seed, "weights": ours.weights, "bf16": True, "nvfp4": False}
    assert vars_of(adapter.Loss.Config()) == {"balance": ours.balance}
    data = vars_of(adapter.Data.Config())
    folders = {"tokenizer_folder": ours.tokenizer, "token_cache": "outputs/tokens"}
    assert data == {name: getattr(ours, name) for name in data if name not in folders} | folders


def vars_of(config: Any) -> dict[str, Any]:
    """Return the fields of a settings' class, which take values by their names alone."""
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        type(config)(1)
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__}


@pytest.mark.parametrize(("seed", "taken"), [(7, 7), (None, 0)])
def test_torchtitans_settings_are_taken_over(train: SimpleNamespace, seed: int | None, taken: int) -> None:
    for dtype in ("bfloat16", "float32"):
        model = train.adapter.TitanModel.Config()
        given = SimpleNamespace(
            debug=SimpleNamespace(seed=seed),
            hf_assets_path="folder",
            training=SimpleNamespace(mixed_precision_param=dtype),
        )
        model.update_from_config(config=given)
        assert (model.seed, model.weights, model.bf16) == (taken, "folder", dtype == "bfloat16")


def test_torchtitan_counts_as_train_py(train: SimpleNamespace) -> None:
    """Parameters, and the FLOPs of a token from which train.py has its speed."""
    with torch.device("meta"):
        model = train.model.Model()
    settings = replace(defaults(train), batch_size=1, seq_len=64)
    speed = train.metrics.Metrics.speed(SimpleNamespace(settings=settings, peak=0), 64.0)
    count, flops = train.adapter.TitanModel.Config().get_nparams_and_flops(model, 64)
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert flops == speed["flops_per_second"]  # one token a second


@pytest.mark.parametrize("rank", [0, 1])
def test_torchtitan_reads_train_pys_windows(train: SimpleNamespace, tmp_path: Path, rank: int) -> None:
    """Two processes of two sequences: each has its rows of a batch, without targets at the ends of documents."""
    data = tmp_path / "tokens.npy"
    torch.manual_seed(0)
    tokens = torch.randint(1, 90, (400,), dtype=torch.int32)
    tokens[::10] = 0
    importlib.import_module("numpy").save(data, tokens.numpy())
    config = train.adapter.Data.Config(document_separator=0, val_fraction=0.1, token_cache=str(tmp_path))
    config.dataset_path = str(data)
    loader = train.adapter.Data(config, dp_world_size=2, dp_rank=rank, seq_len=20, local_batch_size=2)
    windows = train.data.Windows(loader.windows.tokens, 0, 360, 20, defaults(train).seed)
    assert loader.windows.per_epoch == windows.per_epoch
    batches = iter(loader)
    for step in range(3):
        inputs, labels = next(batches)
        assert inputs["input"].shape == inputs["document_ids"].shape == labels.shape == (2, 20)
        for row in range(2):
            ids = inputs["input"][row]
            expected = windows.shuffled(4 * step + 2 * rank + row).ids
            assert torch.equal(ids, expected)
            for t in range(20):
                ends = t == 19 or int(ids[t]) == 0
                assert labels[row, t] == (train.adapter.IGNORE_INDEX if ends else ids[t + 1])
        assert loader.state_dict() == {"sequences": 4 * (step + 1)}
    again = train.adapter.Data(config, dp_world_size=2, dp_rank=rank, seq_len=20, local_batch_size=2)
    again.load_state_dict({"sequences": 4})
    repeated, _ = next(iter(again))
    loader.load_state_dict({"sequences": 4})
    assert torch.equal(repeated["input"], next(iter(loader))[0]["input"])


def test_torchtitan_sums_what_experts_got_over_the_parts_of_a_step(train: SimpleNamespace) -> None:
    model = train.adapter.TitanModel(train.adapter.TitanModel.Config(bf16=False))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    parts = [torch.randint(1, 90, (1, 8)) for _ in range(2)]
    loads = [model(part).tokens_per_expert for part in parts]
    assert not torch.equal(*loads)
    assert torch.equal(model.tokens_per_expert, loads[0] + loads[1])


def test_a_mean_over_all_tokens_for_torchtitan(train: SimpleNamespace) -> None:
    """The loss of the labels' share of the step, with the routers' balance by its factor."""
    loss = train.adapter.Loss(SimpleNamespace(balance=0.5))
    out = SimpleNamespace(loss=torch.tensor(3.0), balance_loss=torch.tensor(2.0))
    labels = torch.tensor([[1, 2, -100, 4]])
    assert loss(out, labels)[0] == 4.0
    assert loss(out, labels, torch.tensor(6))[0] == 2.0
    assert loss(SimpleNamespace(loss=out.loss, balance_loss=None), labels)[0] == 3.0


class Dimensions:
    """As much of torchtitan's ParallelDims as the adapter reads."""

    def __init__(self, cp: int = 1, dp_enabled: bool = False) -> None:
        self.cp, self.ep, self.tp, self.dp_replicate = cp, 2, 3, 5
        self.dp_enabled = dp_enabled

    def get_mesh(self, name: str) -> Any:
        return SimpleNamespace(get_group=lambda: f"group of {name}")


@pytest.fixture
def shared_out(train: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what the adapter asks of parallelize, whose parts are filled, and not shared out."""
    asked: list[Any] = []

    def parallelize(model: Any, meshes: object, prepare: Any, numerics: object, autocast: bool) -> None:
        asked.extend([meshes, numerics, autocast])
        for name, part in train.parallelize.parts(model):
            prepare(name, part)

    def over_all(device: str, **sizes: int) -> tuple[str, dict[str, int]]:
        return device, sizes

    monkeypatch.setattr(train.adapter, "parallelize", parallelize)
    monkeypatch.setattr(train.adapter, "Meshes", SimpleNamespace(over_all=over_all))
    monkeypatch.setattr(train.adapter.utils, "device_type", "cpu", raising=False)
    return asked


def build(train: SimpleNamespace, **settings: Any) -> Any:
    """Return a model without memory, as torchtitan builds it."""
    with torch.device("meta"):
        return train.adapter.TitanModel(train.adapter.TitanModel.Config(**settings))


@pytest.mark.parametrize("nvfp4", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_torchtitan_shares_out_as_train_py(
    train: SimpleNamespace, shared_out: list[Any], nvfp4: bool, bf16: bool
) -> None:
    """Meshes, numerics and autocast are those of the settings; the weights those of train.py's seed."""
    model = build(train, seed=4, nvfp4=nvfp4, bf16=bf16)
    assert train.adapter.distribute(model, parallel_dims=Dimensions(), ac_config=None) is model
    meshes = ("cpu", {"expert": 2, "tensor": 3, "replicate": 5})
    assert shared_out == [meshes, train.adapter.emulate if nvfp4 else None, bf16]
    world = train.world.World(0, 1, torch.device("cpu"))
    expected = train.weights.build_model(replace(defaults(train), seed=4), world, None).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_torchtitan_starts_from_a_checkpoint(train: SimpleNamespace, shared_out: list[Any], tmp_path: Path) -> None:
    whole = train.model.Model()
    train.checkpoint.save_checkpoint(whole, tmp_path / "released")
    model = build(train, weights=str(tmp_path / "released"))
    train.adapter.distribute(model, parallel_dims=Dimensions(), ac_config=None)
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("ac_config", [None, "full"])
def test_torchtitan_computes_blocks_twice_where_it_is_asked(
    train: SimpleNamespace, shared_out: list[Any], ac_config: str | None
) -> None:
    model = train.adapter.distribute(build(train), parallel_dims=Dimensions(), ac_config=ac_config)
    blocks = [module for module in model.modules() if isinstance(module, train.recompute.Recomputable)]
    assert blocks and all(block.gradient_checkpointing == (ac_config is not None) for block in blocks)


@pytest.mark.parametrize("cp", [2, 3])
def test_torchtitan_has_no_context_parallelism(train: SimpleNamespace, shared_out: list[Any], cp: int) -> None:
    with pytest.raises(ValueError, match="no context parallelism: a scan's state passes through the whole sequence"):
        train.adapter.distribute(build(train), parallel_dims=Dimensions(cp), ac_config=None)
    assert not shared_out


@pytest.mark.parametrize("dp_enabled", [False, True])
def test_torchtitan_balances_experts_as_train_py(
    train: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dp_enabled: bool
) -> None:
    """After each step, by the load of all data processes; what is measured is the largest load over the mean."""

    def from_another_process(load: torch.Tensor, group: str) -> None:
        assert group == "group of batch"
        load += torch.tensor([0, 0, 0, 36] + [0] * (load.shape[1] - 4))

    monkeypatch.setattr(dist, "all_reduce", from_another_process)
    model, hooks = train.adapter.TitanModel(train.adapter.TitanModel.Config()), list[Any]()
    for router in model.routers():
        router.e_score_correction_bias.zero_()
    routers, experts = model.routers(), model.config.moe_num_experts
    optimizers = SimpleNamespace(register_step_post_hook=hooks.append)
    train.adapter.balance_experts(optimizers, [model], Dimensions(dp_enabled=dp_enabled))
    load = torch.full((len(routers), experts), 2)
    load[:, 0], load[0, 1] = 0, 10
    model.tokens_per_expert = load.clone()
    (update,) = hooks
    update("any", "arguments")
    if dp_enabled:
        load[:, 3] += 36
    largest = (load.amax(1) / load.double().mean(1)).max()
    assert float(model.measured["expert_load"]) == pytest.approx(float(largest))
    assert model.tokens_per_expert is None  # of the next step nothing is known
    for router, counts in zip(routers, load, strict=True):
        moved = (counts.double().mean() - counts).sign().float() * defaults(train).bias_rate
        torch.testing.assert_close(router.e_score_correction_bias, moved)


def test_torchtitan_learns_in_bfloat16_where_it_is_asked(train: SimpleNamespace) -> None:
    """Gradients of the uses of a weight are summed in float32; the loss of MTP is told beside the loss."""
    ids = torch.randint(1, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    losses: list[float] = []
    for bf16 in (False, True):
        torch.manual_seed(1)
        model = train.adapter.TitanModel(train.adapter.TitanModel.Config(bf16=bf16))
        model.apply(model.init_module)
        out = model(ids)
        losses.append(out.loss.item())
        assert out.logits is None and model.measured["mtp_loss"] == out.mtp_loss
        assert not model.measured["mtp_loss"].requires_grad
        out.loss.backward()
        gradient = model.mtp.layers[0].eh_proj.weight.grad  # once a step of prediction
        assert not torch.equal(gradient, gradient.bfloat16().float())
    assert 0 < abs(losses[0] - losses[1]) < 0.05


def test_torchtitan_shows_means_over_the_processes(train: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    def log(_: object, *values: object, extra_metrics: object) -> None:
        shown.append((values, extra_metrics))

    def all_reduce(values: torch.Tensor) -> None:
        values.mul_(6)

    monkeypatch.setattr(train.adapter.MetricsProcessor, "log", log, raising=False)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    measured = {"mtp_loss": torch.tensor(3.0), "expert_load": torch.tensor(1.5, dtype=torch.float64)}
    metrics = train.adapter.Metrics(model_parts=[SimpleNamespace(measured=measured)])
    metrics.log(7, 1.0)
    metrics.log(8, extra_metrics={"memory": 2})
    means = {"expert_load": 2.25, "mtp_loss": 4.5}
    assert shown == [((7, 1.0), means), ((8,), {"memory": 2} | means)]


def test_torchtitan_limits_the_time_of_a_group(train: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of all processes where none is named. torch's own function is used where it has one."""
    limits: list[tuple[str, object]] = []

    def group(name: str) -> Any:
        def set_limit(limit: object) -> None:
            limits.append((name, limit))

        return SimpleNamespace(set_timeout=set_limit)

    monkeypatch.setattr(train.adapter, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=group("all"))))
    train.adapter.set_timeout("a minute")
    train.adapter.set_timeout("an hour", group("some"))
    assert limits == [("all", "a minute"), ("some", "an hour")]
    assert vars(dist)["set_timeout"] is None  # as the fixture has it


def test_torchtitans_checkpoints_are_exported(train: SimpleNamespace, tmp_path: Path) -> None:
    """In the released layout, from which train.py starts."""
    model = train.model.Model()
    save(model.state_dict(), checkpoint_id=tmp_path / "step-9", no_dist=True)
    train.adapter.export(str(tmp_path / "step-9"), str(tmp_path / "export"))
    again = train.model.Model()
    train.checkpoint.load_checkpoint(again, tmp_path / "export")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_torchtitan_says_what_the_data_lack(train: SimpleNamespace, tmp_path: Path) -> None:
    """A path, and one sequence beside those that are held out."""
    sizes: dict[str, int] = {"dp_world_size": 1, "dp_rank": 0, "local_batch_size": 1, "seq_len": 20}
    config = train.adapter.Data.Config(val_fraction=0.5)
    config.dataset_path = None
    with pytest.raises(ValueError, match=r"^--dataloader\.dataset-path is missing$"):
        train.adapter.Data(config, **sizes)
    config.dataset_path = str(tmp_path / "tokens.npy")
    for count, kept in ((20, 20), (39, 39), (40, 20), (79, 59)):
        importlib.import_module("numpy").save(config.dataset_path, torch.arange(count, dtype=torch.int32).numpy())
        assert train.adapter.Data(config, **sizes).windows.stop == kept
    importlib.import_module("numpy").save(config.dataset_path, torch.arange(19, dtype=torch.int32).numpy())
    with pytest.raises(ValueError, match="has 19 tokens for sequences of 20"):
        train.adapter.Data(config, **sizes)
