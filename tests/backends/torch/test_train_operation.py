"""Optimizers, schedules, roles, averages, checkpoints, reports of train.py: run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .generated import imported, tiny_spec, write_generated

TEXT = b"a small text, again and again; " * 40


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import the generated training program of a small model with MTP."""
    spec = tiny_spec("ME*")
    folder = tmp_path_factory.mktemp("train")
    write_generated(replace(spec, model=replace(spec.model, vocab_size=256)), folder)
    (folder / "text").write_bytes(TEXT)
    with imported(folder) as modules:
        yield modules


def run(train: Any, out: Path, *more: str, steps: int = 4, code: int = 0) -> str:
    """Train for a few steps and return what was said."""
    data = Path(train.train.__file__).with_name("text")
    given = ["--data", str(data), "--out", str(out), "--steps", str(steps), "--batch-size", "2", "--seq-len", "16"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = train.train.main([*given, "--save-every", "1", "--keep", "9", "--val-every", "0", *more])
    assert found == code, said.getvalue()
    return said.getvalue()


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, folder: str = "export") -> dict[str, torch.Tensor]:
    return load_file(out / folder / "model.safetensors")


def rates(train: Any, *given: str, steps: int = 100) -> list[float]:
    common = ["--data", "d", "--out", "o", "--steps", str(steps), "--lr", "1", "--final-lr", "0.1"]
    settings = train.settings.parse_settings("", [*common, *given])
    return [train.optimizer.learning_rate(settings, step) for step in range(steps)]


def test_help_is_in_groups_with_defaults(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.settings.parse_settings(train.train.__doc__, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"\n{name}:\n") for name in train.settings.GROUPS.values()]
    assert places == sorted(places)
    assert "--lr FLOAT" in shown and "learning rate after the warm-up (0.001)" in shown
    assert "--async-checkpoints" in shown and "(True)" in shown


def test_schedules(train: Any) -> None:
    """Warm-up in steps or as a part; what falls ends at final_lr, halfway where its curve says."""
    assert rates(train, "--warmup", "10") == rates(train, "--warmup", "0.1")
    assert rates(train, "--decay", "20") == rates(train)
    for kind, middle in (("cosine", 0.55), ("linear", 0.55), ("wsd", 1 - 0.9 * math.sqrt(0.5))):
        found = rates(train, "--schedule", kind, "--warmup", "20", "--decay", "40")
        assert found[:20] == pytest.approx([(n + 1) / 20 for n in range(20)])
        assert found[-1] == pytest.approx(0.1) and max(found) == pytest.approx(1)
        assert found[59 if kind != "wsd" else 79] == pytest.approx(middle)
    cosine = rates(train, "--schedule", "cosine", "--warmup", "20")
    assert cosine[39] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("size", [1.0, 1e-5])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (3, 24, 16)])
def test_muon_is_that_of_torch(train: Any, shape: tuple[int, ...], size: float) -> None:
    """Three steps of each matrix as torch.optim.Muon makes them, also in a stack, and of small gradients."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = [torch.nn.Parameter(part.clone()) for part in ours.detach().reshape(-1, *shape[-2:])]
    groups = [{"params": [ours], "weight_decay": 0.1, "muon": True}]
    optimizer = train.muon.MuonWithAdamW(groups, lr=0.01)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = size * torch.randn(shape)
        for part, gradient in zip(theirs, ours.grad.reshape(-1, *shape[-2:]), strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.detach().reshape(-1, *shape[-2:]), torch.stack(list(theirs)), rtol=0, atol=2e-4)


def test_groups_of_muon_and_of_weight_decay(train: Any) -> None:
    """Muon has the matrices between embedding and head; vectors and embedding never decay, unless asked to."""
    given = ["--data", "d", "--out", "o", "--steps", "1", "--optimizer", "muon"]
    model = train.model.Model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def members(**wanted: Any) -> set[str]:
        optimizer = train.optimizer.build_optimizer(model, settings)
        groups = [group for group in optimizer.param_groups if all(group[key] == wanted[key] for key in wanted)]
        return {names[id(parameter)] for group in groups for parameter in group["params"]}

    settings = train.settings.parse_settings("", given)
    muon = members(muon=True)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    outside = {"backbone.embeddings.weight", "lm_head.weight", "backbone.layers.0.mixer.conv1d.weight"}
    assert muon == matrices - outside
    assert members(weight_decay=0.0) == set(names.values()) - matrices | {"backbone.embeddings.weight"}
    settings = train.settings.parse_settings("", [*given, "--no-decay", "lm_head,mtp.*"])
    kept = members(weight_decay=0.0)
    assert "lm_head.weight" in kept and "mtp.layers.0.eh_proj.weight" in kept
    assert "backbone.embeddings.weight" not in kept


def test_muon_learns_and_resumes(train: Any, tmp_path: Path) -> None:
    run(train, tmp_path / "whole", "--optimizer", "muon", "--lr", "0.01", steps=8)
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    said = run(train, tmp_path / "again", "--optimizer", "muon", "--lr", "0.01", "--resume-step", "5", steps=8)
    assert "step-000000008 is kept as unused-step-000000008" in said and "going on from" in said
    ours, theirs = weights(tmp_path / "again"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_mtp_is_trained(train: Any, tmp_path: Path) -> None:
    """All else stays as it was, the routers' biases of the trunk with it; the loss of MTP falls."""
    run(train, tmp_path / "first", steps=1)
    start = ["--weights", str(tmp_path / "first" / "export"), "--lr", "0.01"]
    run(train, tmp_path / "mtp", *start, "--train", "mtp.*", steps=6)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "mtp")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("mtp.") for name in changed)
    assert any(name.endswith("e_score_correction_bias") for name in changed)
    lines = metrics(tmp_path / "mtp")
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"] - 0.3


def test_average_of_the_weights(train: Any, tmp_path: Path) -> None:
    """It is what the checkpoints of the steps give; a run that goes on has the same."""
    run(train, tmp_path / "out", "--ema", "0.75", steps=3)
    expected: dict[str, torch.Tensor] = {}
    for step in range(4):
        out = tmp_path / f"{step}"
        run(train, out, "--lr", "1e-30" if step == 0 else "1e-3", "--warmup", "0", "--decay", "0", steps=max(step, 1))
        for name, weight in weights(out).items():
            expected[name] = 0.75 * expected[name] + 0.25 * weight if step else weight
    run(train, tmp_path / "flat", "--ema", "0.75", "--warmup", "0", "--decay", "0", steps=3)
    found, last = weights(tmp_path / "flat", "export_ema"), weights(tmp_path / "flat")
    for name, weight in found.items():
        wanted = last[name] if name.endswith("e_score_correction_bias") else expected[name]
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6)
    run(train, tmp_path / "flat", "--ema", "0.75", "--warmup", "0", "--decay", "0", "--resume-step", "1", steps=3)
    again = weights(tmp_path / "flat", "export_ema")
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_a_damaged_checkpoint_is_passed_over(train: Any, tmp_path: Path) -> None:
    """The one before it is taken, which is said, and the run comes to the same weights."""
    run(train, tmp_path / "out")
    whole = weights(tmp_path / "out")
    folder = tmp_path / "out" / "checkpoints"
    for name in ("step-000000004/__0_0.distcp", "step-000000003/train.json"):
        (folder / name).write_bytes(b"")
    said = run(train, tmp_path / "out", "--resume")
    assert "step-000000004 cannot be read: " in said and "step-000000003 cannot be read: " in said
    assert said.count("; trying the one before it") == 2 and f"going on from {folder}/step-000000002" in said
    assert {path.name for path in folder.iterdir()} == {
        *(f"step-{step:09d}" for step in (1, 2, 3, 4)),
        *(f"unused-step-{step:09d}" for step in (3, 4)),
    }
    assert all(torch.equal(weights(tmp_path / "out")[name], whole[name]) for name in whole)
    said = run(train, tmp_path / "out", "--resume-step", "9", code=6)
    assert "step-000000009 is no checkpoint; there are: step-000000001, step-000000002" in said


def test_resume_without_a_checkpoint_says_so(train: Any, tmp_path: Path) -> None:
    assert "has no checkpoint: the run begins at step 0" in run(train, tmp_path / "out", "--resume", steps=1)


def test_format_of_checkpoints(train: Any, tmp_path: Path) -> None:
    run(train, tmp_path / "out", steps=1)
    about = tmp_path / "out" / "checkpoints" / "step-000000001" / "train.json"
    values = json.loads(about.read_text())
    assert values["format"] == 1
    about.write_text(json.dumps(values | {"format": 2}))
    said = run(train, tmp_path / "out", "--resume", code=6)
    assert "has format 2; this program reads and writes format 1" in said


def test_trace_of_three_steps(train: Any, tmp_path: Path) -> None:
    run(train, tmp_path / "out", "--profile-step", "2", steps=5)
    (path,) = (tmp_path / "out" / "profile").iterdir()
    assert path.name == "step-2.rank-0.json"
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(str(event["name"]).startswith("ProfilerStep#") for event in events if event["ph"] == "X") == 3


def test_wandb(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline unless the user has configured it; every number of a step, each router's load among them."""
    found: list[Any] = []

    def log(numbers: dict[str, float], step: int) -> None:
        found.append((step, numbers))

    def init(**options: Any) -> Any:
        found.append(options)
        return SimpleNamespace(log=log, finish=lambda: found.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run(train, tmp_path / "out", "--wandb", "tiny", steps=1)
    options, (step, numbers), finished = found
    assert (options["project"], options["mode"], options["dir"]) == ("tiny", "offline", str(tmp_path / "out"))
    assert options["config"]["steps"] == 1
    assert step == 1 and {"loss", "mtp_loss", "lr", "expert_load/0", "expert_load/1"} <= numbers.keys()
    assert finished == "finished"
    monkeypatch.setenv("WANDB_MODE", "online")
    run(train, tmp_path / "online", "--wandb", "tiny", steps=1)
    assert found[3]["mode"] == "online"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--wandb needs the package wandb" in run(train, tmp_path / "other", "--wandb", "tiny", steps=1, code=2)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 5070 Ti", 0.0),
        ("NVIDIA GB10", 119.0),
        ("NVIDIA TITAN V", 0.0),
    ],
)
def test_peaks_of_gpus(train: Any, monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    def device_name(_: object) -> str:
        return name

    monkeypatch.setattr(torch.cuda, "get_device_name", device_name)
    world = train.world.World(0, 1, torch.device("cuda"))
    assert train.metrics.peak_of_device(world) == tflops
