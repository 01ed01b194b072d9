"""A service of many replicas, of which a sample is simulated.

Requests come independently of each other, and each goes to one replica by chance; so what comes to one replica is a
Poisson process of the rate over the number of replicas, independent of the others', and one replica over a longer time
is, in distribution, all of them. Of a trace each replica gets its own random part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .replica import Replica
from .result import Load, load_of
from .workload import LONGEST, Lengths, Request, of_replica, poisson, trace

CLOSE = 1.02
"""Ratio of two numbers of replicas between which none is sought."""
MOST_REPLICAS = 1 << 20


@dataclass(frozen=True, slots=True)
class Poisson:
    """Requests that come by chance, `rate` a second to the whole service."""

    rate: float
    prompt: Lengths
    output: Lengths
    shared: int = 0
    """Tokens with which all prompts begin."""
    longest: int = LONGEST
    """Tokens that a prompt may have."""

    def sample(self, replicas: int, requests: int, seed: int) -> list[list[Request]]:
        """Return the requests of one replica, `requests` of them."""
        random = np.random.default_rng(seed)
        rate = self.rate / replicas
        return [list(poisson(rate, requests, self.prompt, self.output, self.shared, random, self.longest))]


@dataclass(frozen=True, slots=True)
class Traced:
    """Requests of a file."""

    path: Path
    longest: int = LONGEST
    """Tokens that a prompt may have."""
    _requests: list[Request] = field(default_factory=list[Request], init=False)

    def sample(self, replicas: int, requests: int, seed: int) -> list[list[Request]]:
        """Return the requests of as many replicas as get at least `requests` together, or of all."""
        if not self._requests:
            self._requests.extend(trace(self.path, self.longest))
        share = max(1.0, len(self._requests) / replicas)
        return of_replica(self._requests, replicas, min(replicas, -(-requests // int(share))), seed)


Workload = Poisson | Traced


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What 99 of 100 requests are to get, in milliseconds; None: whatever comes."""

    first_token: float | None
    token: float | None

    def holds(self, load: Load) -> bool:
        """Whether a replica under this load keeps it."""
        return not (
            load.saturated
            or (self.first_token is not None and load.first_token.p99 > self.first_token)
            or (self.token is not None and load.token.p99 > self.token)
        )


@dataclass(frozen=True, slots=True)
class Service:
    """Replicas of one kind, and what comes to them."""

    make: Callable[[int], Replica]
    """Returns an idle replica, given a seed."""
    workload: Workload
    requests: int
    """That are simulated."""
    seed: int = 0

    def load(self, replicas: int) -> Load | None:
        """Simulate a sample of so many replicas; None where nothing comes to it."""
        done: list[Replica] = []
        for index, requests in enumerate(self.workload.sample(replicas, self.requests, self.seed)):
            replica = self.make(self.seed + index)
            replica.run(requests)
            done.append(replica)
        return load_of(done)

    def needed(self, level: ServiceLevel) -> tuple[int, Load] | None:
        """Return the fewest replicas that keep a service level, within 2 %, and their load; None where none do."""

        def kept(replicas: int) -> Load | None:
            load = self.load(replicas)
            return load if load is not None and level.holds(load) else None

        alone = self.load(1)
        if alone is not None and level.holds(alone):
            return 1, alone
        # what comes over what one answers while it is overloaded is about the least that can do
        answered = 0.0 if alone is None else alone.tokens_per_second / alone.output_tokens
        below, above = 1, 2
        if alone is not None and answered:
            above = max(above, int(alone.requests_per_second / answered / 2))
        while (found := kept(above)) is None:
            below, above = above, -(-above * 3 // 2)
            if above > MOST_REPLICAS:
                return None
        while above - below > 1 and above > CLOSE * below:
            middle = (below + above) // 2
            load = kept(middle)
            below, above, found = (below, middle, load) if load is not None else (middle, above, found)
        return above, found
