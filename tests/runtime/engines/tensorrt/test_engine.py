"""The engine over plans, with TensorRT's runtime played by ONNX Runtime: buffers, order, states, graphs, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from n3c.backends.onnx.emit import OnnxEntry, emit_entry
from n3c.backends.onnx.stages import stages
from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.lower.model import lower
from n3c.passes.serving import Served, serve
from n3c.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from n3c.runtime.engines.onnxruntime.open import cpu_engine
from n3c.runtime.engines.tensorrt.device import cuda_devices
from n3c.runtime.engines.tensorrt.engine import Plan, TrtEngine
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.limits import Room
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
        return TrtEngine(trt, devices, self.plans, parameters, self.checkpoint, self.served.plan, batch=BATCH)

    def cpu(self, checkpoint: Checkpoint | None = None) -> OnnxRuntimeEngine:
        names = list(self.served.program.entry_points)
        return cpu_engine(self.served, self.spec, names, BATCH, checkpoint or self.checkpoint)

    def generate(self, engine: Any, *, speculate: bool = True) -> list[list[int]]:
        drafter = MtpDrafter() if speculate else None
        generation = Generation(engine, PROMPTS, Options(max_new_tokens=8), Room.of(self.spec), drafter=drafter)
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


def test_states_take_what_the_plan_says(small: Small) -> None:
    device = HostDevice()
    plan = small.served.plan
    engine = small.engine(device)
    held = engine.allocated()
    assert held.states == BATCH * plan.total_bytes == device.memories[0].bytes
    assert held.weights == sum(p.type.bytes for p in {p.name: p for e in small.entries for p in e.parameters}.values())
    alone = sum(BATCH * -(-s.bytes // 256) * 256 for s in plan.states if s.kind != "kv")
    assert held.spare_states == alone
    small.generate(engine, speculate=False)
    caches = next(s for s in plan.states if s.kind == "kv")
    part = device.memories[0].data[BATCH * caches.offset :][: caches.bytes].view(np.float32).reshape(caches.shape)
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
        lambda: TrtEngine(FakeTrt(), [HostDevice()], plans, {}, small.checkpoint, small.served.plan, batch=BATCH)
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
