"""Checkpoints of train.py: what a run goes on with, what it refuses, and what a failure leaves."""

from __future__ import annotations

import errno
import os
import resource
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from n3c.specs.schema import Rule, Training

from .generated import imported, tiny_spec, write_generated
from .training_program import arguments, failure


def test_an_earlier_run_is_not_mixed_in(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(text, tmp_path / "out", "--keep", "1")
    assert train.train.main(given) == 0
    assert "add --resume, or choose another --out" in failure(train, capsys, 6, *given)
    assert "lr 0.001, now 0.5" in failure(train, capsys, 6, *given, "--resume", "--lr", "0.5")
    assert "the checkpoint has done 2 steps" in failure(train, capsys, 2, *given, "--resume", "--steps", "1")
    about = tmp_path / "out" / "checkpoints" / "step-000000002" / "train.json"
    about.write_text(about.read_text().replace('"mamba_num_heads": 8', '"mamba_num_heads": 16'))
    assert "is of another spec: mamba_num_heads 16, now 8" in failure(train, capsys, 6, *given, "--resume")
    (about.parent / "__0_0.distcp").write_bytes(b"torn")
    about.write_text(about.read_text().replace('"mamba_num_heads": 16', '"mamba_num_heads": 8'))
    assert "cannot be read" in failure(train, capsys, 6, *given, "--resume")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "[" * 100_000, "nests too deeply"),
        ('"config": {', '"config": [], "left": {', "train.json is not what train.py writes"),
        ('"step": 2', '"step": "2"', "train.json has no step"),
        ('"step": 2', '"step": -2', "train.json has no step"),
        ('"step": 2', '"stop": 2', "train.json has no step"),
        ('"step": 2', '"step": ', "Expecting value"),
    ],
)
def test_a_checkpoint_that_is_damaged(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    given = arguments(text, tmp_path / "out", "--keep", "1")
    assert train.train.main(given) == 0
    about = tmp_path / "out" / "checkpoints" / "step-000000002" / "train.json"
    about.write_text(about.read_text().replace(old, new, 1))
    shown = failure(train, capsys, 6, *given, "--resume")
    assert "cannot be read" in shown and message in shown


@pytest.mark.parametrize("count", [0, 1, 8, 9, 10])
def test_eight_differences_are_told(train: Any, tmp_path: Path, count: int) -> None:
    """And how many more there are; what is missing on either side is one."""
    settings = train.settings.Settings(data="d", out="o", steps=1)
    about = {"config": asdict(train.model.Config()), "settings": asdict(settings), "rules": {}}
    about["settings"] |= {"data": "other", "val_every": 7, "keep": 9}  # which are free to change
    theirs, ours = {f"n{n}": 1 for n in range(count)} | {"same": 0}, {"same": 0}
    if not count:
        train.checkpointing.require_same(tmp_path, about | {"data": theirs}, settings, ours, {})
        return
    for data, now in ((theirs, ours), (ours, theirs)):
        with pytest.raises(train.settings.TrainError) as error:
            train.checkpointing.require_same(tmp_path, about | {"data": data}, settings, now, {})
        told = [f"n{n} {data.get(f'n{n}')}, now {now.get(f'n{n}')}" for n in range(min(count, 8))]
        told += [f"{count - 8} more"] if count > 8 else []
        assert str(error.value) == f"{tmp_path} is of other data: {'; '.join(told)}" and error.value.code == 6


def test_reasons_are_one_line(train: Any) -> None:
    """That of what failed, inside what only reports it."""
    inner, outer = ValueError("a reason\nand more"), RuntimeError("outer")
    outer.__cause__ = inner
    assert train.checkpointing.reason(outer) == "a reason"
    assert train.checkpointing.reason(OSError()) == "OSError"
    assert train.checkpointing.reason(RuntimeError(" first\n second")) == "first"
    failed = train.checkpointing.CheckpointException("all", {0: (inner, None), 1: (OSError("other"), None)})
    assert train.checkpointing.reason(failed) == "a reason"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_how_many_checkpoints_are_kept(train: Any, tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones; what a killed process has left is removed, and a step that is there is not written again."""
    written: list[str] = []

    def save(_: object, checkpoint_id: Path, **__: object) -> None:
        checkpoint_id.mkdir()
        written.append(checkpoint_id.name)

    monkeypatch.setattr(train.checkpointing, "save", save)
    (tmp_path / "store" / ".step-000000007").mkdir(parents=True)
    settings = train.settings.Settings(data="d", out="o", steps=1, async_checkpoints=False)
    model = torch.nn.Linear(2, 2)
    world = train.world.World(0, 1, torch.device("cpu"))
    store = train.checkpointing.Checkpoints(tmp_path / "store", keep, world, {}, {})
    assert store.last_good() == "there is no checkpoint yet"
    for step in (9, 10, 10, 200, 1_000_000_000):
        store.save(model, torch.optim.AdamW(model.parameters()), settings, step)
        assert not store.ready() and store.unfinished is None
    names = [f"step-{step:09d}" for step in (9, 10, 200, 1_000_000_000)]
    assert written == [f".{name}" for name in names]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == sorted(names[-keep:])


def test_resume_keeps_the_data(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings of validation may change, but not what they leave to train on; a seed may be large."""
    given = arguments(text, tmp_path / "out", "--val-every", "1", "--seed", str(2**32 - 1))
    assert train.train.main(given) == 0
    more = [*given, "--resume", "--steps", "3"]
    for change in (["--val-every", "0"], ["--val-fraction", "0.2"], ["--val-data", str(text)]):
        assert "is of other data: train_tokens 1192, now " in failure(train, capsys, 6, *more, *change)
    assert train.train.main([*more, "--val-every", "3", "--val-sequences", "1"]) == 0


def test_resume_keeps_the_rules_of_training(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that was built again with other formats goes on with no run of the first; float32 has none."""
    base = tiny_spec("M*", mtp=None)
    base = replace(base, model=replace(base.model, vocab_size=256))
    rules = (Rule("bf16", roles=("attention.*", "mamba.in_proj")),)
    nvfp4 = arguments(text, tmp_path / "low", "--numerics", "nvfp4")
    float32 = arguments(text, tmp_path / "plain")
    first, second = Training("nvfp4", rules=rules), Training("mxfp8", (1, 16), rules)
    for training, message in ((first, ""), (second, "is of other rules of [training]: "), (first, "")):
        folder = tmp_path / f"{training.format}"
        folder.mkdir(exist_ok=True)
        write_generated(replace(base, training=training), folder)
        with imported(folder) as program:
            assert program.train.main([*float32, "--resume"]) == 0
            if not message:
                assert program.train.main([*nvfp4, "--resume"]) == 0
                continue
            said = failure(program, capsys, 6, *nvfp4, "--resume")
            assert message in said and "backbone.layers.0.mixer.out_proj nvfp4, now mxfp8" in said
            assert "disable_2d_quantization False, now True" in said


def test_moments_go_on_by_this_runs_kernel(train: Any, text: Path, tmp_path: Path) -> None:
    """One process has the fused kernel of a run whose processes had none, as one where experts are shared out."""
    settings = train.settings.parse_settings("", arguments(text, tmp_path, "--no-async-checkpoints"))
    world = train.world.World(0, 1, torch.device("cpu"))
    model = train.weights.build_model(settings, world, None)
    store = train.checkpointing.Checkpoints(tmp_path / "checkpoints", 1, world, {}, {})

    def optimizer(fused: bool) -> torch.optim.Optimizer:
        built: torch.optim.Optimizer = train.optimizer.build_optimizer(model, settings)
        for group in built.param_groups:
            group["fused"] = fused
        return built

    store.save(model, optimizer(False), settings, 1)
    store.finish()
    resumed = optimizer(True)
    assert store.load(model, resumed, settings) == 1
    assert all(group["fused"] is True for group in resumed.param_groups)


@pytest.mark.parametrize("when", ["--async-checkpoints", "--no-async-checkpoints"])
def test_full_disk(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], when: str) -> None:
    """A checkpoint that does not fit leaves the one before it, and the run can go on from that."""
    out = tmp_path / "out"
    assert train.train.main(arguments(text, out)) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = failure(train, capsys, 6, *arguments(text, out, "--resume", "--steps", "4", when))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000000003 cannot be written: " in said and "File too large" in said
    assert said.endswith(f"the last good checkpoint is {out}/checkpoints/step-000000002")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000000001", "step-000000002"]
    assert train.train.main(arguments(text, out, "--resume", "--steps", "4")) == 0


def test_no_space_left(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of the distributed checkpoint itself meets a full disk, in the background."""
    out = tmp_path / "out"
    assert train.train.main(arguments(text, out)) == 0

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = failure(train, capsys, 6, *arguments(text, out, "--resume", "--steps", "4"))
    assert "step-000000003 cannot be written: [Errno 28] No space left on device" in said
    assert said.endswith(f"the last good checkpoint is {out}/checkpoints/step-000000002")
    assert len(list((out / "checkpoints").iterdir())) == 2


def test_a_loss_that_is_not_finite(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops, says which module's output was the first, and keeps the checkpoint."""
    out, bad = tmp_path / "out", tmp_path / "bad"
    assert train.train.main(arguments(text, out)) == 0
    model = train.model.Model()
    broken = model.backbone.layers[1].mixer.shared_experts.up_proj.weight
    for value, where in (
        (torch.inf, "the weight {}.weight was not finite before the step"),
        (1e38, "the output of {} is the first that is not finite"),
    ):
        with torch.no_grad():
            broken.fill_(value)
        train.checkpoint.save_checkpoint(model, bad)
        said = failure(train, capsys, 5, *arguments(text, tmp_path / f"other{value}", "--weights", str(bad)))
        assert said.startswith("step 1: loss ") and said.endswith("there is no checkpoint yet")
        assert where.format("backbone.layers.1.mixer.shared_experts.up_proj") in said

    def overflow(optimizer: torch.optim.Optimizer, closure: None = None) -> None:
        first = optimizer.param_groups[0]["params"][0]
        if first.grad.any():  # DCP makes a step without gradients
            first.data.fill_(torch.inf)

    # Weights that are not finite are never saved.
    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    said = failure(train, capsys, 5, *arguments(text, out, "--resume", "--steps", "9"))
    assert said.startswith("step 3 made weights that are not finite")
    assert said.endswith(f"the last good checkpoint is {out}/checkpoints/step-000000002")


class Written(Future[None]):
    """A checkpoint that is on the disk when one waits for it."""

    def __init__(self, path: Path, log: list[str]) -> None:
        super().__init__()
        self.path, self.log = path, log
        log.append(f"begin {path.name}")

    def result(self, timeout: float | None = None) -> None:
        self.path.mkdir()
        self.log.append(f"end {self.path.name}")


def test_one_checkpoint_at_a_time(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving again waits for the one before; until `finish` nothing has the name of a checkpoint."""
    log: list[str] = []

    def begin(_: object, checkpoint_id: Path, **__: object) -> Written:
        return Written(checkpoint_id, log)

    monkeypatch.setattr(train.checkpointing, "async_save", begin)
    settings = train.settings.parse_settings("", ["--data", "d", "--out", "o", "--steps", "1"])
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    world = train.world.World(0, 1, torch.device("cpu"))
    store = train.checkpointing.Checkpoints(tmp_path / "store", 2, world, {}, {})
    for step in (1, 2):
        store.save(model, optimizer, settings, step)
        assert [path.name for path in store.all()] == [f"step-{n:09d}" for n in range(1, step)]
        assert not store.ready()
    assert log == [f"{what} .step-{n:09d}" for what, n in (("begin", 1), ("end", 1), ("begin", 2))]
    # A process that starts now, as after a kill, finds the first checkpoint only.
    found = train.checkpointing.Checkpoints(tmp_path / "store", 2, world, {}, {}).all()
    assert [path.name for path in found] == ["step-000000001"]
    store.finish()
    assert len(store.all()) == 2
