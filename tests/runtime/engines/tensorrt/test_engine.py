"""The engine over plans, with TensorRT's runtime played by ONNX Runtime: buffers, order, states, graphs, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.stages import stages
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from n3c.runtime.engines.interface import Array, call
from n3c.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from n3c.runtime.engines.onnxruntime.open import cpu_engine
from n3c.runtime.engines.tensorrt.device import cuda_devices
from n3c.runtime.engines.tensorrt.engine import Plan, TrtEngine, spread
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Options
from n3c.specs.schema import Spec
from support.fake_trt import FakeTrt, HostDevice
from support.programs import random_tensors, save_tensors
from support.specs import QUANTIZED, SMALL, spec_from_text

BATCH = 2
PROMPTS = ([1, 2, 3, 4, 5, 6, 7, 8, 9], [11])


@dataclass
class Small:
    """A small quantized model in its float32 rendering, its plans, and what they need."""

    spec: Spec
    served: Served
    checkpoint: Checkpoint
    plans: list[Plan]
    entries: list[OnnxEntry]

    def engine(self, *devices: HostDevice, trt: FakeTrt | None = None) -> TrtEngine:
        parameters = {p.name: p for entry in self.entries for p in entry.parameters}
        trt = trt or FakeTrt()
        return TrtEngine(trt, devices, self.plans, parameters, self.checkpoint, self.served.plan, batch_sizes=[BATCH])

    def cpu(self, checkpoint: Checkpoint | None = None) -> OnnxRuntimeEngine:
        names = list(self.served.program.entry_points)
        return cpu_engine(self.served, self.spec, names, [BATCH], checkpoint or self.checkpoint)

    def generate(self, engine: Any, *, speculate: bool = True) -> list[list[int]]:
        drafter = MtpDrafter() if speculate else None
        generation = Generation(engine, PROMPTS, Options(max_new_tokens=8), Capacity.of(self.spec), drafter=drafter)
        generation.run()
        return [sequence.new for sequence in generation.sequences]


def plan_of(entry: OnnxEntry, folder: Path, stage: int) -> Plan:
    path = folder / f"{entry.name}.plan"
    path.write_bytes(entry.to_bytes())
    return Plan(path, entry.name.partition(".")[0], entry.batch, entry.arguments, entry.results, entry.weights, stage)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """`prefill` is of batch 1, every entry point of three stages but the drafter: what real builds have."""
    folder = tmp_path_factory.mktemp("session")
    text = SMALL.replace("max_seq_len = 32", "max_seq_len = 32\nprefill_chunk = 4\ndraft_tokens = 2")
    spec = spec_from_text(text.replace('"MEM*E-ME"', '"ME*-"') + QUANTIZED.rpartition("[[")[0])
    served = serve(spec)
    checkpoint = save_tensors(random_tensors(lower(spec)), folder / "weights")
    program = served.program
    entries: list[OnnxEntry] = []
    plans: list[Plan] = []
    for name, entry_point in program.entry_points.items():
        for stage, part in stages(program, entry_point, (0, 2, 3)):
            entries.append(emit_entry(program, part, batch=1 if name == "prefill" else BATCH, rendering="float32"))
            plans.append(plan_of(entries[-1], folder, stage))
    assert Counter(plan.entry for plan in plans) == {"prefill": 3, "decode": 3, "verify": 3, "draft": 1}
    return Small(spec, served, checkpoint, plans, entries)


def test_generation_is_that_of_the_cpu(small: Small) -> None:
    """Ragged prompts, stages, drafts: every state is where the next plan reads it."""
    device = HostDevice()
    engine = small.engine(device)
    expected = small.generate(small.cpu())
    assert small.generate(engine) == expected
    assert small.generate(engine, speculate=False) == expected


@pytest.mark.parametrize("count", [2, 3])
def test_stages_on_several_gpus(small: Small, count: int) -> None:
    """Each has the weights and states of its own stages; the residual stream passes; nothing else changes."""
    devices = [HostDevice(index) for index in range(count)]
    engine, alone = small.engine(*devices), small.engine(HostDevice())
    assert small.generate(engine) == small.generate(alone)
    assert not devices[0].received
    assert all(device.received for device in devices[1:])
    assert all(device.captured for device in devices)
    held, held_alone = engine.allocated(), alone.allocated()
    assert (held.states, held.spare_states) == (held_alone.states, held_alone.spare_states)
    embedding = next(b for plan in small.plans for b in plan.weights if b.name == "backbone.embeddings.weight")
    assert held.weights == held_alone.weights + 4 * prod(embedding.shape)  # the drafter, on the last, embeds too
    assert all(sum(m.bytes for m in device.memories) < held.weights for device in devices)
    other = random_tensors(lower(small.spec), seed=5)
    engine.replace_weights(save_tensors(other, small.plans[0].path.parent / f"other{count}"))
    assert small.generate(engine) != small.generate(alone)


def test_a_call_that_comes_again_is_a_graph(small: Small) -> None:
    device = HostDevice()
    engine = small.engine(device)
    first = small.generate(engine)
    captured = device.captured
    assert captured > 0
    assert small.generate(engine) == first
    replayed = device.replayed
    assert small.generate(engine) == first
    assert device.captured <= 2 * captured  # each entry point by the two places of its states, and no more each time
    assert device.replayed > replayed


def test_calls_of_other_lengths_have_graphs_of_their_own(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads up to a multiple of `BUCKET` tokens: its size is an input of the call."""
    whole, cut = HostDevice(), HostDevice()
    expected = small.generate(small.engine(whole), speculate=False)
    monkeypatch.setattr("n3c.runtime.engines.tensorrt.engine.BUCKET", 4)
    engine = small.engine(cut)
    for _ in range(3):
        assert small.generate(engine, speculate=False) == expected
    assert cut.captured > whole.captured


def test_a_replay_with_other_addresses_or_shapes_fails(small: Small) -> None:
    """The stand-in is one: what a real graph would silently get wrong is an error."""
    device = HostDevice()
    model = onnx.load_from_string(next(e for e in small.entries if e.name.startswith("draft")).to_bytes())
    memory = {value.name: device.allocate(1 << 16) for value in (*model.graph.input, *model.graph.output)}
    with device.current():
        engine = FakeTrt().Runtime(None).deserialize_cuda_engine(model.SerializeToString())
        config = engine.create_runtime_config()
        config.allocation, config.dynamic_shapes_kernel_specialization_strategy = "USER_MANAGED", "NONE"
        context, scratch = engine.create_execution_context(config), device.allocate(1024)
        context.set_device_memory(scratch.address, 1024)
        for name, piece in memory.items():
            context.set_tensor_address(name, piece.address)
        context.set_input_shape("key_positions", (4,))
        with pytest.raises(AssertionError, match="captured before it ran"):
            device.capture(lambda: context.execute_async_v3(device.stream))
        assert context.execute_async_v3(device.stream)
        replay = device.capture(lambda: context.execute_async_v3(device.stream))
        replay()
        context.set_input_shape("key_positions", (8,))
        with pytest.raises(AssertionError, match="other shapes"):
            replay()
        context.set_input_shape("key_positions", (4,))
        context.set_tensor_address("hidden", memory["hidden"].address + 256)
        with pytest.raises(AssertionError, match="other addresses"):
            replay()


def test_stages_are_spread_evenly() -> None:
    def stages_of(count: int, devices: int) -> list[list[int]]:
        plans = [Plan(Path(f"{i}.plan"), "decode", 1, (), (), (), i) for i in range(count)]
        return [[plan.stage for plan in part] for part in spread(plans, devices)]

    assert stages_of(4, 3) == [[0, 1], [2], [3]]
    assert stages_of(5, 2) == [[0, 1, 2], [3, 4]]
    assert stages_of(3, 3) == [[0], [1], [2]]
    assert stages_of(3, 1) == [[0, 1, 2]]


def test_other_weights_reset_all_states(small: Small, tmp_path: Path) -> None:
    device = HostDevice()
    engine = small.engine(device)
    small.generate(engine)
    arena, spare = device.memories[1:3]  # after the scratch
    assert arena.data.any() and spare.data.any()
    engine.replace_weights(save_tensors(random_tensors(lower(small.spec), seed=5), tmp_path))
    assert not arena.data.any() and not spare.data.any()


class Unreadable(Checkpoint):
    """A checkpoint whose tensors can be read for a while."""

    def __init__(self, directory: Path, reads: int) -> None:
        super().__init__(directory)
        self._left = reads

    def read(self, name: str) -> Any:
        self._left -= 1
        if self._left < 0:
            raise OSError("the disk is gone")
        return super().read(name)


@pytest.mark.parametrize("kind", ["plans", "onnxruntime"])
def test_an_engine_with_half_of_other_weights_does_not_run(kind: str, small: Small) -> None:
    engine = small.engine(HostDevice()) if kind == "plans" else small.cpu()
    before = small.generate(engine)
    with pytest.raises(OSError, match="the disk is gone"):
        engine.replace_weights(Unreadable(small.checkpoint.directory, 3))
    with pytest.raises(AssertionError, match="replace them again first"):
        small.generate(engine)
    engine.replace_weights(small.checkpoint)
    assert small.generate(engine) == before


def test_states_take_what_the_plan_says(small: Small) -> None:
    device = HostDevice()
    plan = small.served.plan
    engine = small.engine(device)
    held = engine.allocated()
    assert held.states == BATCH * plan.total_bytes == device.memories[1].bytes  # after the scratch
    assert held.weights == sum(p.type.bytes for p in {p.name: p for e in small.entries for p in e.parameters}.values())
    alone = sum(BATCH * -(-s.bytes // 256) * 256 for s in plan.states if s.kind != "kv")
    assert held.spare_states == alone
    small.generate(engine, speculate=False)
    caches = next(s for s in plan.states if s.kind == "kv")
    part = device.memories[1].data[BATCH * caches.offset :][: caches.bytes].view(np.float32).reshape(caches.shape)
    assert np.abs(part[:, : len(PROMPTS[0]) + 7]).min() > 0
    assert not part[:, len(PROMPTS[0]) + 8 :].any()


def test_a_reset_forgets_and_other_weights_need_no_plan(small: Small, tmp_path: Path) -> None:
    device = HostDevice()
    engine = small.engine(device)
    before = small.generate(engine)
    other = save_tensors(random_tensors(lower(small.spec), seed=5), tmp_path)
    engine.replace_weights(other)
    assert small.generate(engine) == small.generate(small.cpu(other)) != before
    engine.replace_weights(small.checkpoint)
    assert small.generate(engine) == before


def test_contexts_of_a_gpu_share_one_scratch(small: Small) -> None:
    trt = FakeTrt()
    devices = [HostDevice(0), HostDevice(1)]
    small.engine(*devices, trt=trt)
    needed = [trt.scratch[len(onnx.load(plan.path).graph.node) % 3] for plan in small.plans]
    assert all(device.memories[0].bytes in needed for device in devices)
    assert max(device.memories[0].bytes for device in devices) == max(needed)


def test_kernels_are_compiled_once_and_kept_beside_the_plans(small: Small) -> None:
    kept = small.plans[0].path.with_name("sm120.runtime-cache")
    kept.unlink(missing_ok=True)
    first, second = FakeTrt(), FakeTrt()
    expected = small.generate(small.engine(HostDevice(), trt=first))
    assert first.compiled and kept.is_file()
    assert small.generate(small.engine(HostDevice(), trt=second)) == expected
    assert not second.compiled
    kept.write_bytes(b"of another GPU")
    assert small.generate(small.engine(HostDevice(), trt=second)) == expected
    assert second.compiled == first.compiled
    assert kept.read_bytes().startswith(b"sm120")


def test_a_folder_that_cannot_be_written_keeps_no_kernels(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError("no space left")

    expected = small.generate(small.cpu())
    monkeypatch.setattr(Path, "write_bytes", full)
    assert small.generate(small.engine(HostDevice())) == expected


def test_what_cannot_be_captured_runs_without_graphs(small: Small) -> None:
    trt, device = FakeTrt(), HostDevice()
    trt.capturable = False
    engine = small.engine(device, trt=trt)
    assert small.generate(engine) == small.generate(engine) == small.generate(small.cpu())
    assert device.captured == 0


def test_a_copy_of_a_sequence_goes_on_in_any_row(small: Small) -> None:
    """On several devices, whichever of its places a state is in, as on a CPU."""
    prompt, following = [4, 9, 2, 7, 1], [3, 8, 5]
    for engine in (small.engine(HostDevice(0), HostDevice(1)), small.cpu()):
        logits: list[Array] = []
        small.generate(engine, speculate=False)
        engine.reset()
        given: dict[str, Array] = {name: np.zeros(BATCH, np.int64) for name in ("counts", "lengths")}
        given |= {name: np.zeros((BATCH, 4), np.int64) for name in ("input_ids", "following_ids")}
        for begin in (0, 4):
            chunk = prompt[begin : begin + 4]
            given["input_ids"][0, : len(chunk)], given["counts"][0] = chunk, len(chunk)
            given["lengths"][0] = begin
            call(engine, "prefill", **given)
        copies = [engine.snapshot(0, 0, 3), engine.snapshot(0, 3, len(prompt))]
        for row in (0, 1):
            if row:
                engine.reset()
                for copied in copies:
                    engine.restore(row, copied)
            for i, token in enumerate(following):
                ids, lengths = np.zeros((BATCH, 1), np.int64), np.zeros(BATCH, np.int64)
                ids[row, 0], lengths[row] = token, len(prompt) + i
                logits.append(call(engine, "decode", input_ids=ids, lengths=lengths)["logits"][row])
        np.testing.assert_allclose(np.stack(logits[3:]), np.stack(logits[:3]), atol=1e-6)
        assert copies[0].bytes < engine.allocated().states


def test_a_sequence_is_reset_alone(small: Small) -> None:
    """In whichever of its two places a state is."""
    device = HostDevice()
    engine = small.engine(device)
    (arena, spare), plan = device.memories[1:3], small.served.plan  # after the scratch
    for _ in range(2):
        small.generate(engine)
        engine.reset([0])
        at = {arena.address: 0, spare.address: 0}
        second: list[Array] = []
        for state in plan.states:
            for memory in (arena,) if state.kind == "kv" else (arena, spare):
                rows = memory.data[at[memory.address] :][: BATCH * state.bytes].reshape(BATCH, -1)
                at[memory.address] += BATCH * -(-state.bytes // 256) * 256
                assert not rows[0].any(), state.name
                second.append(rows[1])
        assert any(row.any() for row in second)
        engine.reset()


def refused(work: Any) -> tuple[str, ExitCode, str]:
    with pytest.raises(N3CError) as error:
        work()
    (diagnostic,) = error.value.diagnostics
    return diagnostic.code, error.value.exit_code, diagnostic.message


def test_a_plan_that_the_runtime_refuses(small: Small, tmp_path: Path) -> None:
    damaged = tmp_path / "decode.b2.plan"
    damaged.write_bytes(small.plans[0].path.read_bytes()[:100])
    plans: Sequence[Plan] = [Plan(damaged, "decode", BATCH, (), (), ())]
    code, exit_code, message = refused(
        lambda: TrtEngine(
            FakeTrt(), [HostDevice()], plans, {}, small.checkpoint, small.served.plan, batch_sizes=[BATCH]
        )
    )
    assert (code, exit_code) == ("E0812", ExitCode.TARGET)
    assert "refused by the runtime" in message


def test_an_execution_that_fails(small: Small) -> None:
    device = HostDevice()
    trt = FakeTrt()
    engine = small.engine(device, trt=trt)
    trt.fails = True
    assert refused(lambda: small.generate(engine))[:2] == ("E0812", ExitCode.TARGET)
    trt.fails = False
    assert small.generate(engine) == small.generate(small.cpu())


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(lambda: cuda_devices(1))[:2] == ("E0801", ExitCode.TARGET)
