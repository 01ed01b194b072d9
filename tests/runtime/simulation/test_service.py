"""Replicas on a virtual clock: hand-computed times, and figures that theory knows."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.passes.serving import serve
from n3c.runtime.simulation.call_times import MeasuredTimes, read_times
from n3c.runtime.simulation.replica import Replica
from n3c.runtime.simulation.result import load_of
from n3c.runtime.simulation.service import Poisson, Service, ServiceLevel, Traced
from n3c.runtime.simulation.workload import Request, lengths_of, poisson, trace
from n3c.specs.load import load_spec
from n3c.specs.shipped import spec_file

SPEC = load_spec(spec_file("tiny"))[0]
SERVING = replace(SPEC.serving, batch_sizes=(1, 2), prefill_chunk=64, max_seq_len=512)
PLAN = serve(SPEC).plan
TIMES = MeasuredTimes(
    {
        "prefill.b1": ((1, 10.0),),
        "prefill.b2": ((1, 15.0),),
        "decode.b1": ((1, 1.0), (101, 2.0)),
        "decode.b2": ((1, 2.0),),
        "draft.b1": ((1, 0.25),),
        "draft.b2": ((1, 0.25),),
        "verify.b1": ((1, 3.0),),
        "verify.b2": ((1, 4.0),),
    },
    draw_seconds=0.5,
    copy_bytes_per_second=1e30,
)


def replica(acceptance: float | None = None, memory: int | None = None) -> Replica:
    return Replica.of(SERVING, PLAN, TIMES, acceptance=acceptance, cache_memory=memory)


def prompt(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def test_a_request_alone_takes_the_sum_of_its_calls() -> None:
    """Two chunks; the first token with the second of them and a draw; then decodes at contexts 71, 72, 73."""
    alone = replica()
    alone.run([Request(5.0, prompt(70), 5)])
    (answered,) = alone.answered
    # the round of the second chunk decodes, too: each chunk is followed by a draw, as is each decode
    second = 1.0 + 0.70 + 0.5
    assert answered.first == answered.request.at + 2 * (10.0 + 0.5) + second
    assert answered.tokens == 5
    further = sum(1.0 + (context - 1) / 100 + 0.5 for context in (72, 73, 74))
    assert answered.last == pytest.approx(answered.first + further)


def test_a_second_request_waits_its_turn_and_uses_the_larger_batch() -> None:
    both = replica()
    both.run([Request(0.0, prompt(10), 3), Request(0.0, prompt(10, 50), 3)])
    assert [each.first for each in both.answered] == [15.0 + 2 * 0.5 + 2.0 + 2 * 0.5] * 2
    assert both.rounds[-1].now == both.rounds[0].now + 2.0 + 2 * 0.5


def test_drafts_that_stand_come_with_one_verification() -> None:
    fast = replica(acceptance=3.0)
    fast.run([Request(0.0, prompt(10), 4)])
    (answered,) = fast.answered
    # prefill, a round: two drafts, verification, and the tokens drawn for each
    assert answered.last == answered.first == 10.0 + 0.5 + 2 * (0.25 + 0.5) + 3.0 + 3 * 0.5
    assert answered.tokens == 4


def test_a_prompt_that_was_read_is_found() -> None:
    kept = replica(memory=10**9)
    kept.run([Request(0.0, prompt(200), 2), Request(1000.0, (*prompt(150), *prompt(50, 900)), 2)])
    assert [each.found for each in kept.answered] == [0, 128]
    assert kept.answered[1].to_first < kept.answered[0].to_first


def test_prompts_that_are_too_long_are_refused() -> None:
    some = replica()
    some.run([Request(0.0, prompt(10), 3), Request(1.0, prompt(600), 3), Request(2.0, prompt(12), 3)])
    assert some.refused == 1 and [len(each.request.prompt) for each in some.answered] == [10, 12]
    with pytest.raises(N3CError, match="600 tokens") as raised:
        replica().run([Request(0.0, prompt(600), 3)])
    assert raised.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("memory", [None, 10**9])
@pytest.mark.parametrize("acceptance", [None, 1.0, 2.2, 3.0])
def test_rounds_that_are_added_up_are_those_that_are_run(acceptance: float | None, memory: int | None) -> None:
    """Of a service that idles, one with a queue, and one that is overloaded: every time and every figure."""
    lengths, serving = lengths_of("", "uniform:3,90"), replace(SERVING, batch_sizes=(1, 2))
    for seed, rate in ((0, 0.002), (1, 0.02), (2, 1.0)):
        given = list(poisson(rate, 60, lengths, lengths, 0, np.random.default_rng(seed)))
        ran = [
            Replica.of(serving, PLAN, TIMES, acceptance=acceptance, cache_memory=memory, seed=seed) for _ in range(2)
        ]
        ran[1].paper = None
        for each in ran:
            each.run(given)
        added, stepped = ran
        assert len(added.rounds) < len(stepped.rounds) / 2
        assert sum(each.count for each in added.rounds) == len(stepped.rounds)
        assert (added.batch.rounds, added.batch.decoded) == (stepped.batch.rounds, stepped.batch.decoded)
        assert [each.first for each in added.answered] == pytest.approx([each.first for each in stepped.answered])
        assert [each.last for each in added.answered] == pytest.approx([each.last for each in stepped.answered])
        assert [each.tokens for each in added.answered] == [each.tokens for each in stepped.answered]
        figures = [load_of([each]) for each in ran]
        assert figures[0] is not None and figures[1] is not None
        for name, value in flat(figures[1].as_json()).items():
            assert flat(figures[0].as_json())[name] == pytest.approx(value, rel=1e-6), name


def flat(table: dict[str, Any], name: str = "") -> dict[str, float]:
    return {
        key: value
        for inner, each in table.items()
        for key, value in (flat(each, f"{inner}.") if isinstance(each, dict) else {name + inner: each}).items()
    }


def test_one_replica_is_all_of_them_in_distribution() -> None:
    """Ten replicas, each request at one of them by chance, against one at a tenth of the rate."""
    lengths = lengths_of("", "uniform:20,60")
    fast = MeasuredTimes({n: tuple((c, s / 150) for c, s in p) for n, p in TIMES.calls.items()}, 0.0, 1e30)
    random = np.random.default_rng(0)
    parts: list[list[Request]] = [[] for _ in range(10)]
    for request in poisson(10.0, 1500, lengths, lengths, 0, random):
        parts[int(random.integers(10))].append(request)
    each: list[Replica] = []
    for part in parts:
        each.append(Replica.of(SERVING, PLAN, fast, acceptance=None, cache_memory=None))
        each[-1].run(part)
    every = load_of(each)
    service = Service(
        lambda seed: Replica.of(SERVING, PLAN, fast, acceptance=None, cache_memory=None, seed=seed),
        Poisson(10.0, lengths, lengths),
        requests=1500,
        seed=7,
    )
    one = service.load(10)
    assert every is not None and one is not None
    assert one.first_token.p50 == pytest.approx(every.first_token.p50, rel=0.1)
    assert one.first_token.p90 == pytest.approx(every.first_token.p90, rel=0.15)
    assert one.token.p50 == pytest.approx(every.token.p50, rel=0.05)
    assert one.running == pytest.approx(every.running, rel=0.1)


def test_the_fewest_replicas_that_keep_a_level() -> None:
    lengths = lengths_of("", "30")
    service = Service(lambda seed: replica(), Poisson(0.1, lengths, lengths), requests=30)
    level = ServiceLevel(first_token=200_000, token=None)
    needed = service.needed(level)
    assert needed is not None and needed[1] is not None
    assert level.holds(needed[1])
    fewer = service.load(needed[0] - 1)
    assert fewer is not None and not level.holds(fewer)
    assert service.needed(ServiceLevel(first_token=1.0, token=None)) is None


def test_traces_share_blocks_and_go_to_replicas_by_chance(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"input_length": 600, "output_length": 2}
    lines = [json.dumps({**row, "timestamp": i, "hash_ids": [7, i]}) for i in range(40)]
    path.write_text("\n".join(lines) + '\n{"timestamp": 90, "input_length": 5, "output_length": 1}\n')
    requests = list(trace(path))
    assert requests[0].prompt[:512] == requests[1].prompt[:512] == tuple(range(7 * 512, 8 * 512))
    assert not set(requests[0].prompt[512:]) & set(requests[1].prompt[512:])
    assert len(requests[3].prompt) == 600 and requests[3].at == 0.003 and len(requests[-1].prompt) == 5
    sampled = Traced(path).sample(replicas=4, requests=15, seed=0)
    assert len(sampled) == 2
    assert sum(map(len, Traced(path).sample(replicas=4, requests=41, seed=0))) == 41


LINE = '{"timestamp": 0, "input_length": 1, "output_length": 1}'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "timestamp"),
        ("{", "line"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "timestamp"),
        (LINE.replace("0", "1e999"), "timestamp"),
        (LINE.replace("0", "1" + "0" * 400), "timestamp"),
        (LINE.replace("0", "NaN"), "timestamp"),
        (LINE.replace("0", "true"), "timestamp"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "input_length"),
        ('{"timestamp": 0, "input_length": 4000000000, "output_length": 1}', "input_length"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}', "hash_ids"),
        (f"{LINE.replace('0', '9', 1)}\n{LINE}", "before"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(N3CError) as raised:
        list(trace(path))
    (found,) = raised.value.diagnostics
    assert found.code == "E0851" and raised.value.exit_code is ExitCode.FILE
    assert found.span is not None and found.span.line == 1 + line.count("\n")
    assert said == "line" or said in found.message


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "uniform:5", "uniform:9,2", "normal:1,2", "lognormal:0,4", "1e3", "99999999",
     "exponential:16777217", f"exponential:{'9' * 400}"],
)  # fmt: skip
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(N3CError, match="--prompt-tokens"):
        lengths_of("--prompt-tokens", text)


def test_lengths_are_drawn_as_described() -> None:
    random = np.random.default_rng(0)

    def drawn(text: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        draw = lengths_of("", text)
        return np.array([draw(random) for _ in range(20_000)])

    assert set(drawn("12")) == {12}
    assert drawn("uniform:3,5").min() == 3 and drawn("uniform:3,5").max() == 5
    assert drawn("exponential:300").mean() == pytest.approx(300, rel=0.03)
    logarithmic = drawn("lognormal:500,4000")
    assert np.percentile(logarithmic, (50, 99)) == pytest.approx((500, 4000), rel=0.1)


def test_measured_times_lie_on_lines_between_what_was_measured(tmp_path: Path) -> None:
    times = MeasuredTimes({"decode.b1": ((10, 1.0), (20, 3.0), (40, 4.0))}, 0.0, 1e9)
    assert [times.call("decode", 1, context) for context in (1, 10, 15, 20, 30, 99)] == [1, 1, 2, 3, 3.5, 4]
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times.as_json()))
    assert read_times(path) == times
    with pytest.raises(N3CError, match=r"decode\.b2"):
        times.require(["decode"], [1, 2], path)


def test_prompts_that_do_not_fit_are_never_made(tmp_path: Path) -> None:
    """A line of eighty bytes can ask for millions of tokens."""
    random, length = np.random.default_rng(0), lengths_of("", "8")
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 8, "output_length": 1}')
    for longest in (7, 8):
        for made in (
            poisson(1.0, 1, length, length, 0, random, longest),
            poisson(1.0, 1, lengths_of("", "1"), length, 7, random, longest),
            trace(path, longest),
        ):
            if longest == 8:
                assert [len(request.prompt) for request in made] == [8]
            else:
                with pytest.raises(N3CError, match="a prompt has 8 tokens, but the model has room for 7") as raised:
                    list(made)
                assert raised.value.exit_code is ExitCode.USAGE


def test_blocks_behind_a_prompt_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": list(range(5000))}
    path.write_text(json.dumps(row))
    tracemalloc.start()
    (request,) = trace(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert request.prompt == tuple(range(600)) and peak < 10**7


TIMES_FILE = '{"calls": {"decode.b1": [[10, 0.5]]}, "draw_seconds": 0.25, "copy_bytes_per_second": 1000.0}'


def test_a_file_of_times(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(TIMES_FILE)
    assert read_times(tmp_path / "times.json") == MeasuredTimes({"decode.b1": ((10, 0.5),)}, 0.25, 1000.0)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"calls": {"decode.b1": []}}',
        '{"calls": {"decode.b1": [[1]]}}',
        '{"calls": {"decode.b1": [[1, 2]]}}',
        *(TIMES_FILE.replace(value, other)
          for value in ("10", "0.5", "0.25", "1000.0")
          for other in ("1e999", "-1e999", "NaN", "true", "-1", "1" + "0" * 400)),
    ],
)  # fmt: skip
def test_a_file_without_times_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(N3CError) as raised:
        read_times(path)
    assert raised.value.diagnostics[0].code == "E0850"
