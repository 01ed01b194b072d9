"""The steps of a run in their order, with stand-ins for what they do: when it validates, saves, traces and stops.

And the small parts of a step: its rate, the average of the weights, what is said of a gradient that broke.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerAction

from .training_program import arguments


class Run:
    """What `steps` has done, a word a call; after one step a signal comes, and after one a checkpoint is written."""

    def __init__(
        self,
        train: Any,
        monkeypatch: pytest.MonkeyPatch,
        *given: str,
        waits: bool = True,
        stopped_in: int = 0,
        written_in: int = 0,
    ) -> None:
        self.log: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.asked: list[int] = []
        self.unread: list[int] = []
        self.stopped_in = stopped_in
        self.step, self.waits, self.quantized, self.average = 0, waits, None, None
        self.model = SimpleNamespace(train=lambda: self.log.append("train"))
        self.settings = train.settings.parse_settings("", arguments(Path("d"), Path("o"), *given))
        self.world = SimpleNamespace(size=1, count=self.count, say=self.log.append)
        self.store = SimpleNamespace(ready=lambda: self.step == written_in, finish=lambda: self.log.append("finish"))
        self.metrics = SimpleNamespace(speed=self.speed, write=self.lines.append)
        self.seconds = 0.0
        monkeypatch.setattr(train.train, "time", SimpleNamespace(perf_counter=lambda: self.seconds))
        monkeypatch.setattr(train.train, "export", self.export)
        self.code = train.train.steps(self, self.metrics, self.asked, lambda: self.log.append("traced"))

    def speed(self, seconds: float) -> dict[str, float]:
        return {"seconds": seconds}

    def count(self, *flags: bool) -> list[int]:
        return [int(flag) for flag in flags]

    def export(self, _: object, __: object, settings: Any, *name: str, **___: object) -> str:
        self.log.append(" ".join(["export", *name[:1]]))
        return "path"

    def train_step(self) -> None:
        self.step += 1
        self.seconds += 2.0
        self.unread.append(self.step)
        self.log.append(f"step {self.step}")
        if self.step == self.stopped_in:
            self.asked.append(15)

    def read(self) -> list[dict[str, Any]]:
        lines = [{"step": step} for step in self.unread]
        self.unread.clear()
        return lines

    def validate(self) -> dict[str, float]:
        self.log.append("validate")
        return {"val_loss": 1.0}

    def save(self) -> None:
        self.log.append("save")

    def when(self, word: str) -> list[int]:
        """Return the steps after which there is a word in the log."""
        step, found = 0, list[int]()
        for entry in self.log:
            step = int(entry.split()[1]) if entry.startswith("step ") else step
            found += [step] if entry == word else []
        return found


def test_a_run_ends_with_its_export(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(train, monkeypatch, "--steps", "1")
    assert run.log == ["train", "step 1", "traced", "save", "finish", "export", "done: path"] and run.code == 0


def test_when_it_validates_and_saves(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many steps, and after the last; by default it may do neither before that."""
    run = Run(train, monkeypatch, "--steps", "8", "--val-every", "3", "--save-every", "5")
    assert run.when("validate") == [3, 6, 8] and run.when("save") == [5, 8]
    assert [line["step"] for line in run.lines if "val_loss" in line] == [3, 6, 8]
    assert run.when("traced") == list(range(1, 9))
    run = Run(train, monkeypatch, "--steps", "4", "--val-every", "0", "--save-every", "9")
    assert run.when("validate") == [] and run.when("save") == [4]


def test_a_step_that_waits_is_told_at_once(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(train, monkeypatch, "--steps", "5", "--log-every", "9", "--save-every", "9")
    assert run.lines == [{"step": step, "seconds": 2.0} for step in range(1, 6)]


def test_others_are_told_together(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mean of their times, when there is something to tell, to validate or to save."""
    given = ["--steps", "11", "--log-every", "4", "--save-every", "6", "--val-every", "7"]
    told: list[int] = []
    read = Run.read

    def count(run: Run) -> list[dict[str, Any]]:
        told.append(len(run.unread))
        return read(run)

    monkeypatch.setattr(Run, "read", count)
    run = Run(train, monkeypatch, *given, waits=False)
    assert told == [4, 2, 1, 1, 3]  # after steps 4, 6, 7, 8, 11
    assert [line["step"] for line in run.lines] == list(range(1, 12))
    assert {line["seconds"] for line in run.lines} == {2.0}
    assert [line["step"] for line in run.lines if "val_loss" in line] == [7, 11]


def test_a_written_checkpoint_gets_its_name_after_the_next_step(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(train, monkeypatch, "--steps", "4", "--save-every", "9", written_in=2)
    assert run.when("finish") == [2, 4]


@pytest.mark.parametrize(("step", "code"), [(2, 143), (3, 0)])
def test_a_signal_stops_after_its_step(train: Any, monkeypatch: pytest.MonkeyPatch, step: int, code: int) -> None:
    """With a checkpoint; after the last step there is nothing to stop."""
    run = Run(train, monkeypatch, "--steps", "3", "--save-every", "9", stopped_in=step)
    assert run.code == code and run.step == step and run.when("save") == [step]
    assert ("stopped by a signal after step 2; --resume goes on" in run.log) == (code == 143)
    assert run.log.index("finish") < len(run.log) - 1 and ("export" in run.log) == (code == 0)


@pytest.mark.parametrize(
    ("step", "done", "traced"),
    [
        *[(1, 0, [1, 2, 3]), (2, 0, [2, 3, 4]), (6, 0, [6, 7, 8]), (6, 4, [6, 7, 8]), (6, 5, [6, 7, 8])],
        *[(6, 6, []), (0, 0, [])],
    ],
)
def test_which_steps_are_traced(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, done: int, traced: list[int]
) -> None:
    """Three from the one that is asked for, warmed up in the one before, whatever an earlier run has done."""
    plans: list[Any] = []

    class Profile:
        def __init__(self, schedule: Any, on_trace_ready: Any) -> None:
            plans.append(schedule)

        def __enter__(self) -> Any:
            return SimpleNamespace(step="step")

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(train.profiling, "profile", Profile)
    settings = train.settings.parse_settings("", arguments(tmp_path / "data", tmp_path, "--profile-step", str(step)))
    with train.profiling.tracing(settings, SimpleNamespace(rank=0), done) as after_step:
        assert after_step == "step" if traced else after_step() is None
    if not traced:
        assert plans == []
        return
    actions = {done + n + 1: plans[0](n) for n in range(20)}
    recorded = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
    assert [number for number, action in actions.items() if action in recorded] == traced
    warm = [number for number, action in actions.items() if action == ProfilerAction.WARMUP]
    assert warm == ([traced[0] - 1] if traced[0] - 1 > done else [])


def test_a_process_by_itself(train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the first of one, sums and gathers its own, and says what is to be said."""
    monkeypatch.delenv("RANK", raising=False)
    world = train.world.World.join(SimpleNamespace(expert_parallel=1, tensor_parallel=1))
    assert (world.rank, world.size, world.data_rank, world.data_size, world.many) == (0, 1, 0, 1, False)
    assert world.count(True, False, True) == [1, 0, 1] and world.gather("own") == ["own"]
    values = torch.ones(2)
    assert world.sum(values) is values
    world.say("a line")
    assert capsys.readouterr().err == "a line\n"
    for sizes, words in (((2, 1), "--expert-parallel 2:"), ((1, 3), "--tensor-parallel 3:")):
        with pytest.raises(train.settings.TrainError, match=f"^{words} start it with torchrun"):
            train.world.World.join(SimpleNamespace(expert_parallel=sizes[0], tensor_parallel=sizes[1]))
    with pytest.raises(train.settings.TrainError, match=r"^--expert-parallel 2 and --tensor-parallel 3: start it"):
        train.world.World.join(SimpleNamespace(expert_parallel=2, tensor_parallel=3))


def test_what_other_processes_say_is_said_once(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train.world.World(1, 2, torch.device("cpu")).say("a line")
    assert capsys.readouterr().err == ""


def test_rates(train: Any) -> None:
    """A phase of 1 is a step, a smaller one a part of all; nothing falls where nothing is to decay."""

    def rates(*given: str) -> list[float]:
        common = ["--data", "d", "--out", "o", "--steps", "10", "--lr", "2", "--final-lr", "0.1"]
        settings = train.settings.parse_settings("", [*common, *given])
        return [train.optimizer.learning_rate(settings, step) for step in range(10)]

    assert rates("--warmup", "0", "--decay", "0") == [2.0] * 10
    assert rates("--warmup", "1", "--decay", "1") == pytest.approx([*[2.0] * 9, 0.2])
    assert rates("--warmup", "0.4", "--decay", "0")[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    linear = rates("--schedule", "linear", "--warmup", "2", "--decay", "0")
    assert linear == pytest.approx([1.0, 2.0, *[2.0 - 1.8 * n / 8 for n in range(1, 9)]])


def test_the_average_of_the_weights(train: Any) -> None:
    """Begins with them, and takes in a part of them after each step, in float32."""
    model = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 1.0)
    average = train.average.Average(model, 0.75)
    assert torch.equal(average.weights["weight"], torch.ones(2, 2))
    for value, expected in ((3.0, 1.5), (1.0, 1.375), (1.0, 1.28125)):
        torch.nn.init.constant_(model.weight, value)
        average.update()
        assert torch.equal(average.weights["weight"], torch.full((2, 2), expected))


def test_where_a_gradient_broke(train: Any) -> None:
    """In the last parameter, where the backward pass came first; or in another process, still earlier."""
    first, second, third = (torch.nn.Linear(2, 2) for _ in range(3))
    model = torch.nn.Sequential(first, second, third)

    def fault(*others: object) -> str:
        def gather(value: object) -> list[object]:
            return [value, *others]

        world = SimpleNamespace(gather=gather)
        said: str = train.faults.first_fault(model, lambda: model(torch.ones(1, 2)), world)
        return said

    assert fault() == "it did not arise again when the step was run again"
    first.weight.grad, second.weight.grad = (torch.full((2, 2), torch.nan) for _ in range(2))
    third.weight.grad = torch.zeros(2, 2)
    assert fault(None) == "the forward pass is finite, the gradient of 1.weight is not"
    assert fault((0, "first"), (9, "last")) == "first"
    torch.nn.init.constant_(second.bias, torch.inf)
    assert fault() == "the weight 1.bias was not finite before the step"
    torch.nn.init.zeros_(second.bias)
    torch.nn.init.constant_(second.weight, 3e38)
    torch.nn.init.constant_(first.bias, 9.0)
    assert fault() == "the output of 1 is the first that is not finite"


class Predictor(torch.nn.Module):
    """As much of a model as predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.head = SimpleNamespace(vocab_size=7), torch.nn.Linear(4, 7)

    def predict(self, *_: object) -> Any:
        return "its own"


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("labels", [[5, 1, 2, 3], [5, -100, -100, 3], [-100, -100, 4, -100], [-100] * 4])
def test_the_divergence_from_a_teacher(train: Any, ahead: int, labels: list[int]) -> None:
    """Its mean over the tokens that are predicted, so far ahead; 0 where there are none."""
    torch.manual_seed(0)
    student, teacher = Predictor(), Predictor()
    train.distillation.Distillation(student, teacher)
    hidden, ours = [torch.randn(1, 4, 4), torch.randn(1, 3, 4)], torch.randn(1, 5 - ahead, 4)
    for number, h in enumerate(hidden, start=1):
        assert teacher.predict(h, None, number, None, True) == (None, None)
    logits, loss = student.predict(ours, torch.tensor([labels]), ahead, None, True)
    p, q = teacher.head(hidden[ahead - 1])[0].softmax(-1), student.head(ours)[0].softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    scored = [each[t].item() for t in range(4 - ahead) if labels[t + ahead] != -100]
    assert logits is None and loss.item() == pytest.approx(sum(scored) / max(len(scored), 1), abs=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    assert student.predict(ours, None, ahead, None, True) == "its own"
    assert student.eval().predict(ours, torch.tensor([labels]), ahead, None, True) == "its own"
