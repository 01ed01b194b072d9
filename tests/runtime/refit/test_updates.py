"""Weights that are pushed: after an update everything is as after a start with them, whatever way they came."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.sources import load
from n3c.compiler import build, export_config, quantize
from n3c.ir.diagnostics import N3CError
from n3c.passes.lower.model import lower
from n3c.passes.pipelines import quantize_pass
from n3c.runtime.build_folder import open_build
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.runner import open_runner
from n3c.runtime.generation.sequence import Options, Running
from n3c.runtime.refit.chunk import described, of_shared_memory, of_tensors
from n3c.runtime.refit.collective import Collective
from n3c.runtime.refit.rollouts import Rollouts
from n3c.runtime.refit.update import WeightUpdates
from support.programs import random_tensors, save_tensors
from support.small_engine import TEXT, SmallModel, small_model, states_of
from support.specs import spec_from_text

FORMATS = """
[quantization]
format = "nvfp4"
block = [16, 16]
[[quantization.rules]]
roles = ["mamba.in_proj"]
format = "fp8"
[[quantization.rules]]
roles = ["moe.router", "mamba.conv1d", "embedding", "lm_head", "mtp.*"]
format = "bf16"
"""


@dataclass
class Case:
    small: SmallModel
    other: Checkpoint
    """Other weights of the same spec."""

    def tensors(self) -> dict[str, Any]:
        return {name: self.other.read(name) for name in self.other}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("refit")
    small = small_model(folder, FORMATS)
    other = save_tensors(random_tensors(lower(small.spec), seed=9), folder / "other")
    export_config(small.spec, output=folder / "other" / "config.json")
    return Case(small, other)


def pushed(case: Case, chunks: int = 3) -> Checkpoint:
    """Push the other weights in chunks, out of order."""
    updates = WeightUpdates(case.small.spec)
    updates.start_weight_update()
    tensors = sorted(case.tensors().items(), key=lambda item: item[0][::-1])
    for part in range(chunks):
        updates.receive(of_tensors(dict(tensors[part::chunks])))
    return updates.finish_weight_update()


def same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether a tensor has the same bytes in both."""
    mine, others = (each.read_bytes(name, 0, each.bytes(name)) for each in (one, other))
    return one.info(name) == other.info(name) and np.array_equal(mine, others)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 9, 10, 11, 12, 3, 4], [1]]


def answers(batch: Batch, count: int = 8) -> list[list[int]]:
    found = [Running.begin(prompt, i, Options(max_new_tokens=count), None) for i, prompt in enumerate(PROMPTS)]
    waiting = list(found)
    while waiting or batch.rows:
        while waiting and batch.free:
            batch.add(waiting.pop(0))
        batch.round()
    return [sequence.new for sequence in found]


def batch_of(case: Case, name: Any, checkpoint: Checkpoint | None = None) -> Batch:
    engine = case.small.engine(name, 1, 2, checkpoint=checkpoint)
    return Batch(engine, Capacity.of(case.small.spec), MtpDrafter(), PrefixCache(10**8, True))


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_after_an_update_everything_is_as_after_a_start(name: Any, case: Case) -> None:
    batch, fresh = batch_of(case, name), batch_of(case, name, case.other)
    before = answers(batch)
    assert batch.cache is not None and batch.cache.bytes
    batch.replace_weights(pushed(case))
    assert batch.cache.bytes == 0
    assert answers(batch) == answers(fresh) != before
    ours, theirs = states_of(batch.engine), states_of(fresh.engine)
    assert all(np.array_equal(ours[state], theirs[state]) for state in theirs)


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_a_sequence_that_runs_goes_on_as_a_prompt_of_its_tokens(name: Any, case: Case) -> None:
    """One is in the middle of its answer, one in the middle of its prompt."""
    batch, fresh = batch_of(case, name), batch_of(case, name, case.other)
    first = Running.begin(PROMPTS[0], 0, Options(max_new_tokens=12), None)
    batch.add(first)
    while len(first.new) < 4:
        batch.round()
    second = Running.begin([*PROMPTS[1], *range(20, 35)], 1, Options(max_new_tokens=4), None)
    batch.add(second)
    batch.round()
    assert not second.is_read
    so_far = list(first.tokens)
    batch.replace_weights(pushed(case))
    while batch.rows:
        batch.round()
    for sequence, prompt in ((first, so_far), (second, list(second.tokens[:25]))):
        again = Running.begin(prompt, 0, Options(max_new_tokens=len(sequence.tokens) - len(prompt)), None)
        fresh.add(again)
        while fresh.rows:
            fresh.round()
        assert sequence.tokens == again.tokens
    assert len(first.new) == 12 and first.new[:4] == so_far[9:13]


def rules(format_: str, block: int = 16, *more: tuple[str, str]) -> str:
    """Return a [quantization] of everything in one format but what some roles have."""
    kept = ("moe.router", "mtp.moe.router", "mamba.conv1d", "embedding", "lm_head")
    listed = [(f'"{role}"', "bf16") for role in kept] + [(f'"{role}"', other) for role, other in more]
    tables = [f'[[quantization.rules]]\nroles = [{role}]\nformat = "{other}"\n' for role, other in listed]
    return f'\n[quantization]\nformat = "{format_}"\nblock = [{block}, 16]\n' + "".join(tables)


FP8 = ("mamba.in_proj", "fp8")
MIXED = (FP8, ("attention.v_proj", "fp8"), ("mtp.attention.q_proj", "bf16"))


@pytest.mark.parametrize(
    "formats",
    [rules("nvfp4", 16, FP8), rules("nvfp4", 1), rules("fp8"), rules("w4a16_nvfp4", 1), rules("nvfp4", 16, *MIXED)],
    ids=["nvfp4", "nvfp4-1x16", "fp8", "w4a16", "mixed"],
)
def test_what_comes_is_quantized_as_the_quantizer_does(formats: str, tmp_path: Path) -> None:
    """Bit by bit, in whatever order q, k and v come, which have one scale; and less is held than came."""
    spec = spec_from_text(TEXT + formats)
    other = save_tensors(random_tensors(lower(spec), seed=9), tmp_path / "other")
    export_config(spec, output=tmp_path / "other" / "config.json")
    quantize(spec, weights=other.directory, output=tmp_path / "quantized")
    expected = Checkpoint(tmp_path / "quantized")
    tensors = {name: other.read(name) for name in other}
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        updates = WeightUpdates(spec)
        updates.start_weight_update()
        for name in order:
            updates.receive(of_tensors({name: tensors[name]}))
        received = updates.finish_weight_update()
        stored = [name for name in expected if not name.endswith("input_scale")]
        assert set(received) == set(stored)
        assert [name for name in stored if not same(received, expected, name)] == []
    assert sum(map(received.bytes, received)) < 0.7 * sum(map(other.bytes, other))
    merged = [name for name in received if name.endswith(("q_proj.weight_scale_2", "k_proj.weight_scale_2"))]
    assert len({float(received.read(name)) for name in merged}) < max(2, len(merged))


def test_reading_an_unquantized_checkpoint_is_quantizing_it(case: Case, tmp_path: Path) -> None:
    """An engine has the same weights either way, with one scale of q, k and v."""
    quantize(case.small.spec, weights=case.other.directory, output=tmp_path / "quantized")
    program = lower(case.small.spec)
    quantize_pass(case.small.spec).run(program)
    quantized = Checkpoint(tmp_path / "quantized")
    for parameter in program.parameters.values():
        assert np.array_equal(load(parameter, case.other), load(parameter, quantized)), parameter.name


def test_a_chunk_of_an_update_that_was_begun_again_is_not_taken(case: Case) -> None:
    """A trainer that vanished in the middle of a chunk leaves nothing in the next update, nor keeps it waiting."""
    tensors = case.tensors()
    first, second = list(tensors)[:2]
    updates, coming, go_on = WeightUpdates(case.small.spec), threading.Event(), threading.Event()

    def slow() -> Iterator[Any]:
        yield from of_tensors({first: tensors[first]})
        coming.set()
        go_on.wait(30)
        yield from of_tensors({second: tensors[second]})

    updates.start_weight_update()
    thread = threading.Thread(target=updates.receive, args=(slow(),))
    thread.start()
    assert coming.wait(30)
    for refused in (updates.finish_weight_update, lambda: updates.receive(of_tensors(tensors))):
        with pytest.raises(N3CError, match="still coming"):
            refused()
    updates.start_weight_update()
    updates.receive(of_tensors(tensors))
    go_on.set()
    thread.join()
    received, expected = updates.finish_weight_update(), pushed(case)
    assert all(same(received, expected, name) for name in expected)


def widened(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a checkpoint of the same values as float32: FP8 of BF16 rounds quotients to BF16, that of float32 not."""
    wide = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint}
    return save_tensors(wide, folder)


def test_experts_may_come_as_a_module_holds_them(case: Case, tmp_path: Path) -> None:
    module = case.small.module()
    updates = WeightUpdates(case.small.spec)
    updates.start_weight_update()
    updates.receive(of_tensors(module.state_dict()))
    received = updates.finish_weight_update()
    ours = batch_of(case, "torch", received)
    fresh = batch_of(case, "torch", widened(case.small.checkpoint, tmp_path / "float32"))
    assert answers(ours) == answers(fresh)


def test_shared_memory(case: Case) -> None:
    tensors = case.tensors()
    raw = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    memory = SharedMemory(create=True, size=len(raw))
    try:
        assert memory.buf is not None
        memory.buf[: len(raw)] = raw
        updates = WeightUpdates(case.small.spec)
        updates.start_weight_update()
        names = list(tensors)
        info = {
            "names": names,
            "dtype_names": [str(tensors[name].dtype) for name in names],
            "shapes": [list(tensors[name].shape) for name in names],
            "shared_memory": memory.name,
        }
        updates.update_weights(info)
        received, expected = updates.finish_weight_update(), pushed(case)
        assert all(same(received, expected, name) for name in expected)
        short = described(["a"], ["float32"], [[len(raw)]])
        with pytest.raises(N3CError, match="fewer than its tensors"):
            list(of_shared_memory(memory.name, short))
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "a/b", None, 3, "x" * 300, "there-is-none"])
def test_names_of_shared_memory_that_are_none(name: Any) -> None:
    with pytest.raises(N3CError, match="shared memory"):
        list(of_shared_memory(name, ()))


WRONG: list[tuple[Any, Any, Any]] = [
    (["a"], ["float32"], []),
    ("a", ["float32"], [[1]]),
    (["a"], ["complex64"], [[1]]),
    (["a"], ["float32"], [[-1]]),
    (["a"], ["float32"], [[1 << 40, 1 << 40]]),
    (["a"], ["float32"], [[True]]),
    (["a"], ["float32"], ["12"]),
    ([7], ["float32"], [[1]]),
    ([""], ["float32"], [[1]]),
    (None, None, None),
]


@pytest.mark.parametrize("lists", WRONG)
def test_descriptions_that_are_none(lists: tuple[Any, Any, Any]) -> None:
    with pytest.raises(N3CError) as raised:
        described(*lists)
    assert raised.value.diagnostics[0].code == "E0855"


def test_an_update_that_does_not_fit_leaves_the_old_weights(case: Case) -> None:
    updates = WeightUpdates(case.small.spec)
    with pytest.raises(N3CError, match="none was started"):
        updates.finish_weight_update()
    with pytest.raises(N3CError, match="none was started"):
        updates.receive(of_tensors({"a": np.zeros(3, np.float32)}))
    tensors = case.tensors()
    name = next(iter(tensors))
    updates.start_weight_update()
    with pytest.raises(N3CError, match="where from"):
        updates.update_weights({"names": [], "dtype_names": [], "shapes": []})
    updates.receive(of_tensors({name: tensors[name]}))
    with pytest.raises(N3CError, match="came twice"):
        updates.receive(of_tensors({name: tensors[name]}))
    with pytest.raises(N3CError) as raised:
        updates.finish_weight_update()
    assert raised.value.diagnostics[0].code == "E0603"
    assert updates.updates == 0 and not updates.running
    updates.start_weight_update()
    updates.receive(of_tensors({**tensors, name: tensors[name][..., :-1]}))
    with pytest.raises(N3CError) as raised:
        updates.finish_weight_update()
    assert "E0606" in {each.code for each in raised.value.diagnostics}
    bad = dict(tensors)
    wide = next(n for n, tensor in bad.items() if tensor.ndim == 2 and n in ReceivedFormats.of(case))
    bad[wide] = np.full_like(bad[wide], np.nan)
    updates.start_weight_update()
    with pytest.raises(N3CError, match="NaN"):
        updates.receive(of_tensors(bad))


class ReceivedFormats:
    """The names of weights that the spec quantizes."""

    @staticmethod
    def of(case: Case) -> set[str]:
        from n3c.runtime.refit.received import ReceivedCheckpoint

        checkpoint: Any = ReceivedCheckpoint(case.small.spec)
        return set(checkpoint._formats)


@pytest.fixture
def group() -> Iterator[tuple[Collective, int]]:
    """A trainer that waits for one engine, and its port."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made: list[Collective] = []
    thread = threading.Thread(target=lambda: made.append(Collective("127.0.0.1", port, 2, 0, timeout=60)))
    thread.start()

    class Later:
        def send(self, data: Any) -> None:
            thread.join()
            made[0].send(data)

    yield Later(), port  # type: ignore[misc]
    thread.join()


def test_a_collective_and_rollouts_with_nemo_rls_names(case: Case, tmp_path: Path, group: tuple[Any, int]) -> None:
    from n3c.specs.dump import dump_spec

    (tmp_path / "spec.toml").write_text(dump_spec(case.small.spec))
    build(tmp_path / "spec.toml", target="torch", output=tmp_path / "out")
    runner = open_runner(
        open_build(tmp_path / "out"), case.small.checkpoint.directory, engine="torch", sequences=2, continuous=True
    )
    rollouts = Rollouts(runner, max_new_tokens=6)
    data = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0], [9, 1, 0]]), "input_lengths": torch.tensor([3, 1, 2])}
    before = rollouts.generate(data, greedy=True)
    trainer, port = group
    tensors = {name: torch.as_tensor(np.array(t, np.float32)) for name, t in case.tensors().items()}
    rollouts.prepare_refit_info({name: (t.shape, t.dtype) for name, t in tensors.items()})
    sending = threading.Thread(
        target=lambda: [trainer.send(t.numpy().reshape(-1).view(np.uint8)) for t in tensors.values()]
    )
    sending.start()
    rollouts.init_collective("127.0.0.1", port, 2, train_world_size=1)
    assert rollouts.update_weights_from_collective()
    sending.join()
    assert rollouts.prepare_for_generation() and rollouts.prepare_for_generation()
    after = rollouts.generate(data, greedy=True)
    assert not torch.equal(before["output_ids"], after["output_ids"])
    widened(case.other, tmp_path / "float32")
    export_config(case.small.spec, output=tmp_path / "float32" / "config.json")
    assert rollouts.update_weights_from_directory(tmp_path / "float32")
    again = rollouts.generate(data, greedy=True)
    assert all(torch.equal(again[key], after[key]) for key in after)
    assert after["generation_lengths"].tolist() == [6, 6, 6] and after["truncated"].all()
    assert after["unpadded_sequence_lengths"].tolist() == [9, 7, 8]
    assert (after["logprobs"][0, :3] == 0).all() and (after["logprobs"][0, 3:9] < 0).all()
    assert rollouts.finish_generation() and rollouts.finish_generation() and rollouts.shutdown()
