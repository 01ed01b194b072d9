"""The engine over generated PyTorch: packed formats against the reference, graphs and kernels by their stand-ins."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.backends.safetensors.sources import load
from n3c.compiler import export_config, quantize
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.ir.program import Parameter
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.runtime.engines.interface import Array, Engine, call
from n3c.runtime.engines.reference.engine import ReferenceEngine
from n3c.runtime.engines.torch.engine import TorchEngine
from n3c.runtime.engines.torch.graphs import Recorder
from n3c.runtime.engines.torch.kernel_operations import KernelOperations, Kernels
from n3c.runtime.engines.torch.model import stored_parameters
from n3c.runtime.engines.torch.network import Network
from n3c.runtime.engines.torch.open import torch_engine
from n3c.runtime.engines.torch.operations import MakeOperations
from n3c.runtime.engines.torch.packed import PackedWeight
from n3c.runtime.engines.torch.plain import PlainOperations
from n3c.runtime.engines.torch.weights import CheckpointWeights, RandomWeights
from n3c.runtime.generation.drafter import MtpDrafter
from support.fake_graphs import FakeRecorder
from support.fake_kernels import fake_kernels
from support.programs import random_tensors, save_tensors
from support.small_engine import TEXT, SmallModel, generated, small_model, states_of
from support.specs import QUANTIZED, spec_from_text

CPU = torch.device("cpu")
PROMPTS = [[5, 90, 3, 3, 17, 60, 2, 8, 41, 22, 7], [11], [1, 2, 3, 4, 5, 6, 7, 8]]
NARROW = TEXT.replace('kv_cache_dtype = "fp32"', 'kv_cache_dtype = "bf16"').replace(
    'conv_state_dtype = "fp32"', 'conv_state_dtype = "bf16"'
)
MIXED = QUANTIZED.replace("last 4", "last 2")


NO_BLOCKS_OF_16_ROWS = '[[quantization.rules]]\nroles = ["mamba.in_proj", "*moe.router", "lm_head"]\nformat = "bf16"\n'


def whole(format_: str, block: str) -> str:
    """Return a table that gives every linear one format, where it can have that."""
    rules = NO_BLOCKS_OF_16_ROWS if block == "[16, 16]" else ""
    return f'[quantization]\nformat = "{format_}"\nblock = {block}\n{rules}'


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """NVFP4, FP8 and BF16 side by side."""
    return small_model(tmp_path_factory.mktemp("mixed"), MIXED)


def made(
    small: SmallModel,
    batch: int,
    dtype: torch.dtype = torch.float32,
    recorder: Recorder | None = None,
    operations: MakeOperations = PlainOperations,
) -> TorchEngine:
    names, weights = tuple(small.served.program.entry_points), CheckpointWeights(small.checkpoint)
    return TorchEngine(
        small.served,
        small.spec,
        names,
        [batch],
        weights,
        device=CPU,
        dtype=dtype,
        operations=operations,
        recorder=recorder,
    )


def session(engine: Engine) -> list[dict[str, Array]]:
    """Return the outputs of every entry point, called so that each reads what the one before left."""
    ids = np.random.default_rng(7).integers(0, 97, (2, 16))
    counts = np.array([8, 3])
    outputs = [
        call(engine, "prefill", input_ids=ids[:, :8], following_ids=ids[:, 1:9], counts=counts, lengths=counts * 0)
    ]
    for accepted, tokens in (([0, 0], ids[:, 8:11]), ([3, 1], ids[:, 11:14])):
        hidden = outputs[-1].get("hidden")
        assert hidden is not None
        step = call(engine, "draft", input_ids=tokens[:, :1], hidden=hidden[:, -1:], lengths=counts - 1)
        outputs.append(step)
        follow = np.roll(tokens, -1, axis=1)
        counts = counts + np.array(accepted)
        outputs.append(
            call(
                engine,
                "verify",
                input_ids=tokens,
                following_ids=follow,
                lengths=counts,
                accepted=np.array(accepted),
            )
        )
    return [*outputs, call(engine, "decode", input_ids=ids[:, 14:15], lengths=counts)]


def assert_near(ours: list[dict[str, Array]], theirs: list[dict[str, Array]], error: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=0, atol=error * np.abs(other[name]).max())


@pytest.mark.parametrize(
    "formats",
    [
        MIXED,
        whole("nvfp4", "[16, 16]"),
        whole("w4a16_nvfp4", "[1, 16]"),
        whole("fp8", "[1, 16]"),
        whole("bf16", "[1, 16]"),
    ],
    ids=["mixed", "nvfp4", "w4a16_nvfp4", "fp8", "bf16"],
)
def test_packed_weights_compute_what_the_quantized_program_means(formats: str, tmp_path: Path) -> None:
    """Every entry point and every state, against the reference evaluation."""
    small = small_model(tmp_path, formats)
    engine, reference = small.engine("torch", 2), small.engine("reference", 2)
    assert_near(session(engine), session(reference), 1e-5)
    expected = states_of(reference)
    for name, state in states_of(engine).items():
        np.testing.assert_allclose(state, expected[name], rtol=0, atol=1e-5 * max(1, np.abs(expected[name]).max()))


def test_weights_are_held_as_they_are_stored(mixed: SmallModel, tmp_path: Path) -> None:
    """A quantized checkpoint takes the bytes that its files have."""
    export_config(mixed.spec, output=mixed.checkpoint.directory / "config.json", force=True)
    quantize(mixed.spec, weights=mixed.checkpoint.directory, output=tmp_path / "packed")
    packed = fitting_checkpoint(mixed.spec, tmp_path / "packed")
    engine = mixed.engine("torch", 2, checkpoint=packed)
    stored = sum(packed.bytes(name) for name in packed if not name.endswith("input_scale"))
    assert engine.allocated().weights == stored
    assert_near(session(engine), session(mixed.engine("reference", 2, checkpoint=packed)), 1e-5)


def test_experts_are_read_one_by_one(mixed: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stack of experts is ever in host memory."""
    largest: list[int] = []

    def read(parameter: Parameter, checkpoint: Any) -> Any:
        largest.append(len(parameter.type.dims))
        return load(parameter, checkpoint)

    monkeypatch.setattr("n3c.runtime.engines.torch.weights.load", read)
    made(mixed, 1)
    assert max(largest) == 3  # the convolution's weight [X, 1, W]; experts are [8, I, L]
    assert largest.count(2) > 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [False, True], ids=["PyTorch", "kernels"])
def test_recorded_calls_are_those_that_run(dtype: torch.dtype, kernels: bool, tmp_path: Path) -> None:
    """Graphs of `decode`, `verify` and `draft`: one each, from the second call on; the same tokens and states."""
    spec = spec_from_text(NARROW.replace("n_group = 4\ntopk_group = 2\n", "") + MIXED)
    small = SmallModel(spec, serve(spec), save_tensors(random_tensors(lower(spec)), tmp_path))
    called: list[str] = []
    made_by: MakeOperations = partial(KernelOperations, kernels=fake_kernels(called)) if kernels else PlainOperations
    recorder = FakeRecorder()
    plain = made(small, 4, dtype, operations=made_by)
    recorded = made(small, 4, dtype, recorder, made_by)
    for drafter in (None, MtpDrafter()):
        expected = generated(plain, spec, PROMPTS, 20, drafter)
        assert generated(recorded, spec, PROMPTS, 20, drafter) == expected
        theirs = states_of(plain)
        for name, state in states_of(recorded).items():  # of longer caches, attention sums in another order
            error = 0.05 if dtype == torch.bfloat16 else 1e-5
            np.testing.assert_allclose(state, theirs[name], rtol=0, atol=error * max(1, np.abs(theirs[name]).max()))
    assert recorder.recorded == 3 and not recorded.unrecorded
    assert recorder.replayed > 20
    assert set(called) == ({field.name for field in fields(Kernels)} if kernels else set())


def test_bf16_on_kernels_is_near_float32(tmp_path: Path) -> None:
    """What a GPU computes, by stand-ins of its kernels; a token whose router turns to another expert may be far off."""
    spec = spec_from_text(NARROW + MIXED)
    small = SmallModel(spec, serve(spec), save_tensors(random_tensors(lower(spec)), tmp_path))
    exact = session(made(small, 2))
    operations = partial(KernelOperations, kernels=fake_kernels([]))
    for engine in (made(small, 2, torch.bfloat16), made(small, 2, torch.bfloat16, operations=operations)):
        for ours, theirs in zip(session(engine), exact, strict=True):
            for name, value in ours.items():
                assert np.median(np.abs(value - theirs[name])) < 0.02 * np.abs(theirs[name]).max()


def test_replayed_graphs_read_weights_that_were_replaced(mixed: SmallModel, tmp_path: Path) -> None:
    recorder = FakeRecorder()
    engine = made(mixed, 1, recorder=recorder)
    before = generated(engine, mixed.spec, [[1, 2, 3]], 8, MtpDrafter())
    other = save_tensors(random_tensors(lower(mixed.spec), seed=9), tmp_path)
    engine.replace_weights(other)
    expected = generated(mixed.engine("torch", 1, checkpoint=other), mixed.spec, [[1, 2, 3]], 8, MtpDrafter())
    assert generated(engine, mixed.spec, [[1, 2, 3]], 8, MtpDrafter()) == expected != before
    assert recorder.recorded == 2  # verify and draft, of the old weights' time


def test_the_stand_in_notices_what_a_graph_would_freeze(mixed: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that cuts the caches by lengths that the host knows is recorded for those lengths alone."""
    at = [0]

    def decoded() -> Array:
        engine, logits = made(mixed, 1, recorder=FakeRecorder()), np.zeros(1)
        for length in range(12):
            at[0] = length
            logits = call(engine, "decode", input_ids=np.array([[length]]), lengths=np.array([length]))["logits"]
        assert not engine.unrecorded
        return logits

    right, real = decoded(), Network.run

    def knows_lengths(self: Network, entry: str, inputs: Any, _: Any) -> Any:
        return real(self, entry, inputs, at)

    monkeypatch.setattr(Network, "run", knows_lengths)
    assert np.abs(decoded() - right).max() > 1e-3


def test_what_cannot_be_recorded_runs_as_it_is(mixed: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generated(made(mixed, 1), mixed.spec, [[1, 2, 3]], 12, MtpDrafter())
    real = Network.run

    def waits(self: Network, entry: str, inputs: Any, on_host: Any) -> Any:
        return real(self, entry, inputs, inputs["lengths"].tolist() if entry == "verify" else on_host)

    monkeypatch.setattr(Network, "run", waits)
    engine = made(mixed, 1, recorder=FakeRecorder())
    assert generated(engine, mixed.spec, [[1, 2, 3]], 12, MtpDrafter()) == expected
    assert engine.unrecorded.keys() == {("verify", 1)}
    assert "not permitted when stream is capturing" in engine.unrecorded["verify", 1]


def test_fp8_caches(tmp_path: Path) -> None:
    """Keys and values in E4M3 behind the scales of the checkpoint, in all entry points, against the reference."""
    spec = spec_from_text(TEXT.replace('kv_cache_dtype = "fp32"', 'kv_cache_dtype = "fp8"'))
    tensors = random_tensors(lower(spec))
    attention = {name.rpartition(".")[0] for name in tensors if name.endswith(("k_proj.weight", "v_proj.weight"))}
    tensors |= {f"{name}.{name[-6]}_scale": torch.tensor(0.01) for name in attention}
    checkpoint, served = save_tensors(tensors, tmp_path), serve(spec)
    small = SmallModel(spec, served, checkpoint)
    reference = ReferenceEngine(served.program, checkpoint, batch_sizes=[2], capacity=48)
    engine = made(small, 2, torch.bfloat16)
    exact, narrow = session(reference), session(engine)
    assert_near(narrow, exact, 0.1)
    assert {s.dtype for n, s in engine.states.items() if n.endswith("cache")} == {torch.float8_e4m3fn}
    wide = session(made(small, 2))
    assert any(np.abs(a["logits"] - b["logits"]).max() > 1e-3 for a, b in zip(wide, exact, strict=True))


OTHERS = {
    "no attention, no MTP": (('"MEM*-E"', '"MEM"'), ('[mtp]\npattern = "*E"\ndepth = 2\n', "")),
    "two caches in MTP": (('"MEM*-E"', '"*-"'), ('pattern = "*E"', 'pattern = "**"')),
    "tied": (("initializer_range", "tie_word_embeddings = true\ninitializer_range"),),
    "plain experts": (("latent_size = 32\n", ""), ("shared_intermediate_size = 80\n", "")),
    "no bias": (("chunk_size = 8", "chunk_size = 8\nconv_bias = false"),),
}
"""What is replaced in the spec."""


@pytest.mark.parametrize("change", OTHERS)
def test_other_architectures(change: str, tmp_path: Path) -> None:
    text = TEXT
    for old, new in OTHERS[change]:
        assert old in text
        text = text.replace(old, new)
    spec = spec_from_text(text)
    small = SmallModel(spec, serve(spec), save_tensors(random_tensors(lower(spec)), tmp_path))
    drafter = MtpDrafter() if spec.mtp else None
    expected = generated(small.engine("reference", 3), spec, PROMPTS, 8, drafter)
    recorder = FakeRecorder()
    assert generated(small.engine("torch", 3), spec, PROMPTS, 8, drafter) == expected
    assert generated(made(small, 3, recorder=recorder), spec, PROMPTS, 8, drafter) == expected
    assert recorder.recorded


def test_random_weights_of_every_format(mixed: SmallModel) -> None:
    """Made on the device in the stored formats; activations stay of their size, and the same seed gives the same."""
    names, parameters = tuple(mixed.served.program.entry_points), stored_parameters(mixed.spec)

    def engine(seed: int) -> TorchEngine:
        weights = RandomWeights(parameters, seed)
        return torch_engine(mixed.served, mixed.spec, names, [2], weights)

    first = session(engine(0))
    assert all(np.isfinite(value).all() for outputs in first for value in outputs.values())
    assert 0.05 < np.std(first[-1]["logits"]) < 5
    assert_near(session(engine(0)), first, 0)
    assert np.abs(session(engine(1))[-1]["logits"] - first[-1]["logits"]).max() > 0.1
    for name, parameter in parameters.items():
        if parameter.format in ("nvfp4", "fp8") and not name.endswith(("_scale", "_scale_2")):
            weight = filled(parameters, name).dequantized(torch.float32)
            assert weight.std() * weight.shape[-1] ** 0.5 == pytest.approx(0.6, rel=0.1)


def filled(parameters: dict[str, Parameter], name: str) -> PackedWeight:
    """Return a weight of random codes and scales."""
    source = RandomWeights(parameters)
    shape = parameters[name].type.static_dims
    nvfp4 = parameters[name].format == "nvfp4"
    data = torch.empty((*shape[:-1], shape[-1] // 2) if nvfp4 else shape, dtype=torch.uint8)
    source.fill(parameters[name], data)
    scale = torch.empty(shape[:-2])
    source.fill(parameters[f"{name}_scale_2" if nvfp4 else f"{name}_scale"], scale)
    if not nvfp4:
        return PackedWeight("fp8", data, None, scale, shape)
    blocks = torch.empty((*shape[:-1], shape[-1] // 16), dtype=torch.uint8)
    source.fill(parameters[f"{name}_scale"], blocks)
    return PackedWeight("nvfp4", data, blocks, scale, shape)


def test_no_gpu(mixed: SmallModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = CheckpointWeights(mixed.checkpoint)
    with pytest.raises(N3CError) as error:
        torch_engine(mixed.served, mixed.spec, ["decode"], [1], weights, "cuda")
    assert (error.value.diagnostics[0].code, error.value.exit_code) == ("E0801", ExitCode.TARGET)
