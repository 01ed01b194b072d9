"""Prefill, decode, verify and draft of whole small models: what engines and ONNX Runtime get, against the reference."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from n3c.backends.onnx.bindings import BYTES, parameter_of
from n3c.backends.onnx.emit import emit_entry
from n3c.ir.formats import as_bytes
from n3c.ir.types import DType, TensorType
from n3c.passes.lower.model import lower
from n3c.passes.serving import serve
from n3c.specs.schema import Spec
from support.programs import load_parameters, random_tensors, save_tensors
from support.serving import OnnxServed, RuntimeServed, Served
from support.specs import QUANTIZED, small_spec, weight_only

CHUNK = 20  # with two sequences more rows than the one-token form of linears takes
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(5))


def chunked(formats: str = "", caches: str = "fp32", windows: str = "fp32") -> Spec:
    plain = 'max_seq_len = 32\nkv_cache_dtype = "fp32"\nconv_state_dtype = "fp32"'
    types = f'kv_cache_dtype = "{caches}"\nconv_state_dtype = "{windows}"'
    return small_spec(formats, odd=(plain, f"max_seq_len = 32\nprefill_chunk = {CHUNK}\n{types}"))


class Pair:
    """Two ways to serve one model; `worst` is the largest difference, of outputs relative to the largest value."""

    def __init__(self, ours: Served, theirs: Served) -> None:
        self.ours, self.theirs, self.worst = ours, theirs, 0.0

    def call(self, entry: str, **inputs: Tensor) -> dict[str, Tensor]:
        expected, actual = self.theirs.call(entry, **inputs), self.ours.call(entry, **inputs)
        for name, value in expected.items():
            self.worst = max(self.worst, float((actual[name] - value).abs().max() / value.abs().max()))
        for name, state in self.theirs.states.items():
            scale = state.float().abs().max().clamp(min=1e-3)
            self.worst = max(self.worst, float((self.ours.states[name].float() - state.float()).abs().max() / scale))
        return expected

    def rounds(self) -> float:
        """Two ragged chunks, a token, then draft and verify with two acceptances; return `worst`."""
        lengths, outputs = torch.zeros(2, dtype=torch.int64), dict[str, Tensor]()
        for piece in (torch.tensor([CHUNK, 7]), torch.tensor([3, 0])):
            ids, following = IDS[:, :CHUNK], IDS[:, 1 : CHUNK + 1]
            outputs = self.call("prefill", input_ids=ids, following_ids=following, counts=piece, lengths=lengths)
            lengths = lengths + piece
        self.call("decode", input_ids=IDS[:, 3:4], lengths=lengths)
        lengths, accepted, hidden = lengths + 1, torch.tensor([0, 0]), outputs["hidden"]
        for taken in (torch.tensor([2, 1]), torch.tensor([4, 3])):
            self.call("draft", input_ids=IDS[:, 4:5], hidden=hidden, lengths=lengths - 1)
            ids, following = IDS[:, 5:9], IDS[:, 6:10]
            outputs = self.call("verify", input_ids=ids, following_ids=following, lengths=lengths, accepted=accepted)
            lengths, accepted, hidden = lengths + taken, taken, outputs["hidden"][:, :1]
        return self.worst


@pytest.mark.parametrize("formats", ["", QUANTIZED], ids=["bf16", "quantized"])
def test_the_float32_rendering_in_onnx_runtime(formats: str, tmp_path: Path) -> None:
    """Quantized weights are dequantized exactly; what rounding activations does has tests of its own."""
    spec = weight_only(chunked(formats))
    program, checkpoint = serve(spec).program, save_tensors(random_tensors(lower(spec)), tmp_path)
    theirs = Served(program, load_parameters(program, checkpoint), 2)
    assert Pair(RuntimeServed(program, checkpoint, 2), theirs).rounds() < 1e-5


@pytest.mark.parametrize(
    ("formats", "states", "tolerance"),
    [
        ("", "fp32", 1e-5),
        ("", "bf16", 6e-2),
        ("", "fp8", 0.15),  # a code more or less of a cache is 1 in 14
        (QUANTIZED.replace('"nvfp4"', '"w4a16_nvfp4"').replace('"fp8"', '"bf16"'), "fp32", 1e-5),
        (QUANTIZED, "fp32", 0.1),  # where the order of sums tips a rounding
    ],
    ids=["float32", "bf16 states", "fp8 caches", "weights of 4 bits", "activations of 4 bits"],
)
def test_the_files_that_engines_are_built_from(formats: str, states: str, tolerance: float, tmp_path: Path) -> None:
    """BF16 states make products over many rows BF16; NVFP4 and FP8 round their activations as the reference does."""
    spec = chunked(formats, states, "fp32" if states == "fp32" else "bf16")
    program, checkpoint = serve(spec).program, save_tensors(random_tensors(lower(spec)), tmp_path)
    parameters = load_parameters(program, checkpoint)
    worst = Pair(OnnxServed(program, parameters, 2), Served(program, parameters, 2)).rounds()
    assert worst < tolerance


@pytest.mark.parametrize("name", ["prefill", "decode", "verify", "draft"])
def test_graphs_are_valid_onnx(name: str) -> None:
    program = serve(small_spec(QUANTIZED)).program
    entry = emit_entry(program, name, batch=2)
    model = onnx.load_from_string(entry.to_bytes())
    if name != "prefill":  # the checker does not know TensorRT's quantization
        onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    assert [value.name for value in graph.input] == [b.name for b in (*entry.arguments, *entry.weights)]
    assert [value.name for value in graph.output] == [b.name for b in entry.results]
    tokens = program.entry_points[name].tokens
    assert entry.dynamic_inputs == {"key_positions": (tokens, 32, 32)}
    read = {input_ for node in graph.node for input_ in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    read |= {value.name for value in graph.output}
    assert all(read & set(node.output) for node in graph.node)  # nothing is computed in vain


def test_entry_points_share_the_memory_of_weights() -> None:
    """A weight has its name as it is stored; what decode gathers, and what overflows, is bound as bytes of it."""
    program = serve(small_spec(QUANTIZED)).program
    entries = {name: emit_entry(program, name, batch=1) for name in program.entry_points}
    bound = {name: {b.name: b for b in entry.weights} for name, entry in entries.items()}
    decode, prefill = bound["decode"], bound["prefill"]
    for binding in decode.values():
        stored = prefill[parameter_of(binding.name)]
        assert binding.memory == stored.memory
        if binding.name.endswith(BYTES):
            assert as_bytes(TensorType(DType(stored.dtype), stored.shape)) == TensorType(DType.I8, binding.shape)
            assert stored.name not in decode and ".experts." in stored.name
        else:
            assert stored == binding
    assert any(name.endswith(BYTES) for name in decode)
    memories = {name: {b.memory for b in of.values()} for name, of in bound.items()}
    assert memories["prefill"] - memories["decode"] <= memories["draft"]
    assert memories["verify"] == memories["prefill"]


@pytest.mark.parametrize(("tokens", "overflows"), [(8, False), (256, True)])
def test_prefill_binds_experts_as_bytes_only_where_buckets_overflow(tokens: int, overflows: bool) -> None:
    program = serve(small_spec(QUANTIZED)).program
    weights = emit_entry(program, "prefill", batch=1, tokens=tokens).weights
    experts = [b for b in weights if "layers.1.mixer.experts.*.up_proj" in b.name]
    as_bytes = [b for b in experts if b.name.endswith(BYTES)]
    stored = {b.name: b for b in experts if b not in as_bytes}
    assert {b.dtype for b in stored.values()} >= {"f4e2m1", "f8e4m3"}
    names = [name for name in stored if name.endswith((".weight", ".weight_scale"))]
    assert [parameter_of(b.name) for b in as_bytes] == (names if overflows else [])
    assert all((b.dtype, b.memory) == ("i8", stored[parameter_of(b.name)].memory) for b in as_bytes)
