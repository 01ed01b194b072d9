"""The figures of a simulated service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from n3c.runtime.benchmark.result import Percentiles

from .replica import Answered, Replica, Round

WARM_UP = 0.1
"""Part of the requests that come before anything is counted: the cache and the batch fill."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica did, from the coming of the first request that counts to that of the last."""

    requests: int
    refused: int
    """Requests whose prompts are longer than the model's context."""
    seconds: float
    first_token: Percentiles
    """From the coming of a request, in milliseconds."""
    token: Percentiles
    """Of a request's tokens after the first, their mean, in milliseconds."""
    prompt_tokens: float
    """A request, on average."""
    output_tokens: float
    tokens_per_second: float
    """Output tokens of a replica."""
    requests_per_second: float
    """That come to a replica."""
    found: float
    """Share of the prompts' tokens that the cache had."""
    busy: float
    """Share of the time in which the engine computes."""
    running: float
    """Sequences of a round, on average."""
    acceptance_length: float
    saturated: bool
    """Whether more requests than rows wait at the end: they come faster than they are answered."""

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c simulate --json`, key `replica`."""
        return {
            "requests": self.requests,
            "refused": self.refused,
            "seconds": round(self.seconds, 3),
            "time_to_first_token_ms": self.first_token.as_json(),
            "time_per_token_ms": self.token.as_json(),
            "prompt_tokens": round(self.prompt_tokens, 1),
            "output_tokens": round(self.output_tokens, 1),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "requests_per_second": round(self.requests_per_second, 6),
            "found": round(self.found, 4),
            "busy": round(self.busy, 4),
            "running": round(self.running, 3),
            "acceptance_length": round(self.acceptance_length, 4),
            "saturated": self.saturated,
        }


def load_of(replicas: Sequence[Replica]) -> Load | None:
    """Return what `replicas` of one service did, together; None where fewer than two requests count of each."""
    answered: list[Answered] = []
    rounds: list[Round] = []
    seconds = busy = 0.0
    for replica in replicas:
        counted = replica.answered[int(WARM_UP * len(replica.answered)) :]
        if len(counted) < 2:
            continue
        begin, end = counted[0].request.at, counted[-1].request.at
        within = [each for each in replica.rounds if begin < each.now <= end]
        if not within:
            continue
        answered += counted
        rounds += within
        seconds += end - begin
        before = next((each.busy for each in reversed(replica.rounds) if each.now <= begin), 0.0)
        busy += within[-1].busy - before
    if not seconds:
        return None
    prompts = sum(len(each.request.prompt) for each in answered)
    drafted = sum(replica.batch.rounds for replica in replicas)
    a_token = [each.a_token for each in answered if each.a_token is not None]
    return Load(
        requests=len(answered),
        refused=sum(replica.refused for replica in replicas),
        seconds=seconds,
        first_token=Percentiles.of([each.to_first for each in answered]),
        token=Percentiles.of(a_token or [0.0]),
        prompt_tokens=prompts / len(answered),
        output_tokens=sum(each.tokens for each in answered) / len(answered),
        tokens_per_second=sum(each.tokens for each in rounds) / seconds,
        requests_per_second=len(answered) / seconds,
        found=sum(each.found for each in answered) / prompts,
        busy=min(1.0, busy / seconds),
        running=sum(each.running * each.count for each in rounds) / sum(each.count for each in rounds),
        acceptance_length=sum(replica.batch.decoded for replica in replicas) / drafted if drafted else 1.0,
        saturated=any(replica.waiting_at_end > replica.batch.engine.batch for replica in replicas),
    )
