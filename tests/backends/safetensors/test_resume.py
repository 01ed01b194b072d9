"""The working directory of a checkpoint that is made: whose it is, and what of it is done."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from n3c.backends.locks import locked
from n3c.backends.safetensors.layout import KEEP, Shard, Weight
from n3c.backends.safetensors.resume import Done, WorkDirectory, require_new
from n3c.ir.diagnostics import N3CError

PLAN = {"mark": "one"}
FIGURES = [1.0, 0.5, 0.25]


def weight(name: str, format_: str = "nvfp4") -> Weight:
    return Weight(name, "BF16", (16, 16), "q_proj", "", format_, 1, (), (), name)


def shard(*weights: Weight) -> Shard:
    return Shard("a.safetensors", weights, b"", {}, {}, size=8)


def begun(folder: Path, *parts: tuple[int, int], bytes_: int = 8) -> WorkDirectory:
    """Return a directory with a plan, a shard of 8 bytes and the lock files that killed processes of `parts` left."""
    work = WorkDirectory(folder / "out")
    with work.claimed(PLAN, (1, 1), resume=False):
        pass
    for number, count in parts:
        (work.state / f"part-{number}-of-{count}.lock").touch()
    (work.result / "a.safetensors").write_bytes(bytes(bytes_))
    return work


@pytest.mark.parametrize(
    ("at_work", "wanted", "refused"),
    [
        ((1, 1), (1, 1), "this output"),
        ((1, 1), (2, 3), "this output"),
        ((2, 3), (1, 1), "part 2 of 3"),
        ((2, 3), (2, 3), "part 2 of 3"),
        ((2, 3), (2, 4), "part 2 of 3"),
        ((2, 3), (1, 2), "part 2 of 3"),
        ((2, 3), (1, 3), None),
        ((2, 3), (3, 3), None),
    ],
)
def test_who_may_work_beside_whom(
    at_work: tuple[int, int], wanted: tuple[int, int], refused: str | None, tmp_path: Path
) -> None:
    work = begun(tmp_path, at_work, (1, 3))  # that of (1, 3) holds nothing
    with ExitStack() as stack:
        stack.enter_context(locked(work.state / f"part-{at_work[0]}-of-{at_work[1]}.lock"))
        if refused is None:
            stack.enter_context(WorkDirectory(work.out).claimed(PLAN, wanted, resume=True))
            return
        with pytest.raises(N3CError, match=f"at work on {refused}\n") as caught:
            stack.enter_context(WorkDirectory(work.out).claimed(PLAN, wanted, resume=True))
        assert caught.value.diagnostics[0].code == "E0617"


@pytest.mark.parametrize(
    ("plan", "part", "resume", "told"),
    [
        (PLAN, (1, 1), True, None),
        (PLAN, (1, 1), False, "an interrupted run of this output is there"),
        (PLAN, (1, 2), False, None),
        ({"mark": "two"}, (1, 1), True, "had another checkpoint"),
        ({"mark": "two"}, (1, 2), False, "had another checkpoint"),
    ],
)
def test_what_an_interrupted_run_left(
    plan: dict[str, str], part: tuple[int, int], resume: bool, told: str | None, tmp_path: Path
) -> None:
    work = begun(tmp_path)
    with ExitStack() as stack:
        if told is None:
            stack.enter_context(work.claimed(plan, part, resume=resume))
        else:
            with pytest.raises(N3CError, match=told):
                stack.enter_context(work.claimed(plan, part, resume=resume))
    assert (work.result / "a.safetensors").is_file()


@pytest.mark.parametrize(("part", "kept"), [((1, 1), False), ((1, 2), True)])
def test_what_was_killed_before_it_had_a_plan(part: tuple[int, int], kept: bool, tmp_path: Path) -> None:
    """Another part may be about to write its plan."""
    work = begun(tmp_path)
    (work.state / "plan.json").unlink()
    with work.claimed(PLAN, part, resume=False):
        assert (work.result / "a.safetensors").is_file() is kept


Line = tuple[str, int, list[str]]


@pytest.mark.parametrize(
    ("lines", "weights"),
    [
        ([("a.safetensors", 1, ["x"])], 1),
        ([("a.safetensors", 3, ["x", "y"])], 3),  # `k` is kept and has no figures
        ([("a.safetensors", 2, ["x", "y"]), ("a.safetensors", 1, ["x"])], 2),
        ([("a.safetensors", 1, ["x"]), ("a.safetensors", 2, ["y"])], 2),
        ([("a.safetensors", 2, ["x"])], 0),
        ([("a.safetensors", 4, ["x", "y"])], 0),
        ([("b.safetensors", 1, ["x"])], 0),
        ([], 0),
    ],
)
def test_how_many_weights_of_a_shard_are_done(lines: list[Line], weights: int, tmp_path: Path) -> None:
    made = shard(weight("x"), weight("y"), weight("k", KEEP))
    work = begun(tmp_path)
    rows = [{"shard": file, "weights": count, "figures": dict.fromkeys(of, FIGURES)} for file, count, of in lines]
    torn = ['{"shard": "a.safetensors", "wei', '{"shard": "a.safetensors", "weights": 3, "figures": {"x": [1.0, 2.0]}}']
    (work.state / "part-1-of-1.jsonl").write_text("\n".join([*map(json.dumps, rows), *torn]))
    assert work.done([made])["a.safetensors"].weights == weights


@pytest.mark.parametrize("size", [0, 7, 9, None])
def test_a_shard_that_was_cut_or_removed_is_not_done(size: int | None, tmp_path: Path) -> None:
    work = begun(tmp_path, bytes_=size or 0)
    if size is None:
        (work.result / "a.safetensors").unlink()
    row = {"shard": "a.safetensors", "weights": 1, "figures": {"x": FIGURES}}
    (work.state / "part-1-of-1.jsonl").write_text(json.dumps(row))
    assert work.done([shard(weight("x"))]) == {"a.safetensors": Done()}


def test_a_journal_goes_on_only_when_it_is_resumed(tmp_path: Path) -> None:
    work = begun(tmp_path)
    with work.journal((1, 2), resume=False) as journal:
        journal.write("a.safetensors", 1, {"x": FIGURES})
    with pytest.raises(N3CError, match="part 1 of 2 was begun already"), work.journal((1, 2), resume=False):
        pass
    with work.journal((1, 2), resume=True) as journal:
        journal.write("a.safetensors", 2, {"y": FIGURES})
    assert work.done([shard(weight("x"), weight("y"))])["a.safetensors"].weights == 2


@pytest.mark.parametrize(("there", "refused"), [("nothing", False), ("empty", False), ("file", True), ("full", True)])
def test_an_output_must_be_new(there: str, refused: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.touch()
    elif there != "nothing":
        out.mkdir()
        (out / "mine").touch() if there == "full" else None
    if not refused:
        require_new(out)
        return
    with pytest.raises(N3CError) as caught:
        require_new(out)
    assert caught.value.diagnostics[0].code == "E0611"
