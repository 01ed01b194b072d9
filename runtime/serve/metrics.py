"""Figures of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from n3c.runtime.generation.sequence import Ending

from .scheduler import Scheduler, Ticket

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """An observer of a scheduler, with a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._ended = Counter("n3c_sequences", "Sequences that ended, by reason.", ["ending"], registry=registry)
        self._prompt_tokens = Counter("n3c_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached_tokens = Counter("n3c_cached_tokens", "Tokens of prompts that the cache had.", registry=registry)
        self._tokens = Counter("n3c_generated_tokens", "Tokens that were generated.", registry=registry)
        self._queue_seconds = Histogram("n3c_queue_seconds", "Time in the queue.", buckets=SECONDS, registry=registry)
        self._first_token_seconds = Histogram(
            "n3c_time_to_first_token_seconds", "From submission to the first token.", buckets=SECONDS, registry=registry
        )
        self._token_seconds = Histogram(
            "n3c_time_per_token_seconds", "Of a token after the first.", buckets=SECONDS, registry=registry
        )
        self._request_seconds = Histogram(
            "n3c_sequence_seconds", "From submission to the end.", buckets=SECONDS, registry=registry
        )
        self._round_seconds = Histogram("n3c_round_seconds", "Of a round.", buckets=SECONDS, registry=registry)
        self._batch = Histogram("n3c_batch_sequences", "Sequences of a round.", buckets=ROWS, registry=registry)

    def watch(self, scheduler: Scheduler, waiting: Callable[[], int]) -> None:
        """Let the registry have the scheduler's own figures too."""
        self.registry.register(_Figures(scheduler, waiting))

    def joined(self, ticket: Ticket) -> None:
        """Count the prompt and what the cache had of it."""
        assert ticket.started is not None
        self._queue_seconds.observe(ticket.started - ticket.submitted)
        self._prompt_tokens.inc(len(ticket.work.prompt))
        self._cached_tokens.inc(ticket.cached_tokens)

    def took(self, ticket: Ticket, tokens: int, now: float) -> None:
        """Time the tokens; those of one round share its time."""
        self._tokens.inc(tokens)
        if ticket.first_token is None:
            self._first_token_seconds.observe(now - ticket.submitted)
        elif ticket.last_token is not None:
            for _ in range(tokens):
                self._token_seconds.observe((now - ticket.last_token) / tokens)

    def ended(self, ticket: Ticket, ending: Ending, now: float) -> None:
        """Count the end."""
        self._ended.labels(ending).inc()
        self._request_seconds.observe(now - ticket.submitted)

    def stepped(self, seconds: float, running: int) -> None:
        """Time the round."""
        self._round_seconds.observe(seconds)
        self._batch.observe(running)

    def text(self) -> bytes:
        """Return the registry in Prometheus' text format."""
        return generate_latest(self.registry)


class _Figures(Collector):
    """Read where they are when they are asked for."""

    def __init__(self, scheduler: Scheduler, waiting: Callable[[], int]) -> None:
        self._scheduler, self._waiting = scheduler, waiting

    def collect(self) -> Iterable[Metric]:
        batch = self._scheduler.batch
        yield GaugeMetricFamily("n3c_sequences_waiting", "Sequences in the queue.", value=self._waiting())
        yield GaugeMetricFamily("n3c_sequences_running", "Sequences in the batch.", value=len(batch.rows))
        yield CounterMetricFamily("n3c_rounds", "Rounds, counted for each sequence.", value=batch.rounds)
        yield CounterMetricFamily("n3c_decoded_tokens", "Tokens of them, with accepted drafts.", value=batch.decoded)
        if batch.cache is not None:
            yield CounterMetricFamily("n3c_cache_hits", "Prompts with a part in the cache.", value=batch.cache.hits)
            yield GaugeMetricFamily("n3c_cache_bytes", "Of the prefix cache.", value=batch.cache.bytes)
