"""Requests: when they come, how long their prompts and answers are, and what prompts have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.ir.json_file import is_count, parse_json
from n3c.runtime.options import usage_error

TOKENS = 1 << 62
"""Tokens of simulated prompts are below this."""
LONGEST = 1 << 24
"""Tokens of a prompt or an answer: more than any model's context."""
BLOCK = 512
"""Tokens of a block of a trace (Mooncake, arXiv 2407.00079)."""
_LINE_MOST = 1 << 20
"""Bytes of a line of a trace."""
_LATEST = 10**15
"""Milliseconds of a timestamp, those since 1970 among them."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request of a simulated client. Tokens of prompts are numbers without meaning: equal ones are shared."""

    at: float
    """Seconds after the start."""
    prompt: tuple[int, ...]
    output_tokens: int


Lengths = Callable[[np.random.Generator], int]
"""Draws a length."""

_NUMBER = r"(\d+(?:\.\d+)?)"


def lengths_of(option: str, text: str) -> Lengths:
    """Return what draws the lengths that `text` describes; N3CError (E0701, exit code 2) for anything else.

    `512`; `uniform:100,2000`; `exponential:500`, by the mean; `lognormal:500,4000`, by median and 99th percentile.
    All are whole numbers from 1 to `LONGEST`.
    """
    fixed = re.fullmatch(r"\d{1,8}", text)
    if fixed and 0 < int(text) <= LONGEST:
        return lambda _: int(text)
    found = re.fullmatch(rf"(uniform|lognormal):{_NUMBER},{_NUMBER}|(exponential):{_NUMBER}", text)
    if found is None:
        forms = "512, uniform:100,2000, exponential:500 or lognormal:500,4000 (median and 99th percentile)"
        raise usage_error(f"{option}: {text!r} is no length; give {forms}")
    if found[4]:
        mean = float(found[5])
        if mean > LONGEST:
            raise usage_error(f"{option}: {text!r}: the mean is at most {LONGEST:,}")
        return lambda random: min(LONGEST, max(1, round(random.exponential(mean))))
    low, high = float(found[2]), float(found[3])
    if not 1 <= low <= high <= LONGEST:
        raise usage_error(f"{option}: {text!r}: the first number is at least 1 and at most the second")
    if found[1] == "uniform":
        return lambda random: int(random.integers(round(low), round(high) + 1))
    deviation = np.log(high / low) / 2.3263478740408408  # the 99th percentile of the normal distribution
    return lambda random: min(LONGEST, max(1, round(low * float(np.exp(deviation * random.standard_normal())))))


def poisson(
    rate: float,
    count: int,
    prompt: Lengths,
    output: Lengths,
    shared: int,
    random: np.random.Generator,
    longest: int = LONGEST,
) -> Iterator[Request]:
    """Yield `count` requests that come independently, `rate` a second; prompts begin with `shared` common tokens.

    N3CError (E0802, exit code 2) for a prompt of more than `longest` tokens, before there is one.
    """
    at = 0.0
    _require_fits(shared + 1, longest)
    common = tuple(range(shared))
    for index in range(count):
        at += float(random.exponential(1 / rate))
        length = max(shared + 1, prompt(random))
        _require_fits(length, longest)
        begin = (index + 1) * LONGEST
        yield Request(at, (*common, *range(begin, begin + length - shared)), output(random))


def _require_fits(length: int, longest: int) -> None:
    if length > longest:
        message = f"a prompt has {length:,} tokens, but the model has room for {longest:,}"
        raise N3CError(Diagnostic("E0802", message, help="a larger serving.max_seq_len"), ExitCode.USAGE)


def trace(path: Path, longest: int = LONGEST) -> Iterator[Request]:
    """Yield the requests of a file of JSON lines, in the form of Mooncake's traces; N3CError (E0851, exit code 6).

    Of each line `timestamp` in milliseconds, not descending; `input_length`, `output_length` and, where prompts have
    beginnings in common, `hash_ids`: one for each block of 512 tokens, the same for the same tokens from the start.
    N3CError (E0802, exit code 2) for a prompt of more than `longest` tokens.
    """
    before = 0.0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_MOST + 1), b""), start=1):
            if line.strip():
                request = _traced(line, number, path, longest)
                if request.at < before:
                    raise _bad(path, number, "`timestamp` is before that of the line above")
                before = request.at
                yield request


def _traced(line: bytes, number: int, path: Path, longest: int) -> Request:
    try:
        data = parse_json(line) if len(line) <= _LINE_MOST else None
    except ValueError as error:
        raise _bad(path, number, str(error)) from error
    row = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    at: Any = row.get("timestamp")
    length: Any = row.get("input_length")
    output: Any = row.get("output_length")
    hashes: Any = row.get("hash_ids", [])
    if not (is_count(at, _LATEST) or (isinstance(at, float) and 0 <= at <= _LATEST)):
        raise _bad(path, number, "`timestamp` is no number of milliseconds")
    if not all(is_count(value, LONGEST) and value > 0 for value in (length, output)):
        raise _bad(path, number, f"`input_length` and `output_length` are to be whole numbers from 1 to {LONGEST:,}")
    if not (isinstance(hashes, list) and all(is_count(value, 1 << 48) for value in cast("list[object]", hashes))):
        raise _bad(path, number, "`hash_ids` is no list of whole numbers")
    _require_fits(length, longest)
    blocks = cast("list[int]", hashes)[: -(-length // BLOCK)]
    shared = [token for block in blocks for token in range(block * BLOCK, (block + 1) * BLOCK)][:length]
    # of this line alone
    own = TOKENS - (number + 1) * LONGEST
    return Request(at / 1000, (*shared, *range(own, own + length - len(shared))), output)


def _bad(path: Path, line: int, message: str) -> N3CError:
    help_ = 'a line is {"timestamp": 0, "input_length": 655, "output_length": 52, "hash_ids": [0, 1]}'
    return N3CError(Diagnostic("E0851", f"no trace: {message}", Span(str(path), line), help=help_), ExitCode.FILE)


def of_replica(requests: Iterable[Request], replicas: int, sampled: int, seed: int) -> list[list[Request]]:
    """Return the requests of the first `sampled` of `replicas`, where each request goes to one of them by chance."""
    random = np.random.default_rng((seed, 1))
    found: list[list[Request]] = [[] for _ in range(sampled)]
    for request in requests:
        replica = int(random.integers(replicas))
        if replica < sampled:
            found[replica].append(request)
    return found
