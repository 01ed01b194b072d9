"""Where plans come from: the cache, a plan of the same build with the same graph, or a process that builds one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from n3c.backends.caches import FOLDER, cache_folder
from n3c.backends.progress import Progress
from n3c.backends.trt.build import PlanResult
from n3c.backends.trt.builder_process import Order, Step
from n3c.backends.trt.builders import Builders
from n3c.backends.trt.plan_cache import PlanCache
from n3c.compiler.report.units import format_bytes
from n3c.ir.diagnostics import Diagnostic, Severity, Span


@dataclass(slots=True)
class Counts:
    """How many plans came from where."""

    built: int = 0
    cached: int = 0
    """From the cache."""
    same: int = 0
    """Of the same graph as another one of the build."""

    def as_json(self) -> dict[str, int]:
        """Return the form of `n3c build --json`."""
        return {"built": self.built, "cached": self.cached, "same": self.same}


def _no_cache(error: OSError) -> Diagnostic:
    place = Span(error.filename) if isinstance(error.filename, str) else None
    message = f"plans are not kept for later builds: {error.strerror or error}"
    help_ = f"{FOLDER} names another folder; with --no-cache none is asked for"
    return Diagnostic("W0524", message, place, Severity.NOTE, help_)


class PlanSource:
    """Gives every plan that is wanted; what it builds or finds goes through a cache of `cache_bytes`, 0 for none."""

    def __init__(self, builders: Builders, cache_bytes: int) -> None:
        self.counts = Counts()
        self.peak: int | None = None
        """The most memory that a process which built a plan has held, in bytes."""
        self.notes: list[Diagnostic] = []
        """W0524 where the cache cannot be written."""
        self._builders = builders
        self._cache: PlanCache | None = None
        if cache_bytes:
            try:
                self._cache = PlanCache(cache_folder() / "plans", cache_bytes)
            except OSError as error:
                self.notes.append(_no_cache(error))
        self._keys: dict[Path, str] = {}
        self._wanted: dict[str, list[Path]] = {}
        """Key → the plans that have it; the first is built, or found."""
        self._found: list[PlanResult] = []
        self._total = 0

    def want(self, order: Order, key: str | None) -> None:
        """Have a plan made; those of equal `key` are the same, and None says that the plan is to be built."""
        self._total += 1
        if key is None:
            self._builders.order(order)
            return
        self._keys[order.plan] = key
        plans = self._wanted.setdefault(key, [])
        plans.append(order.plan)
        if len(plans) > 1:
            return
        found = self._cache.take(key, order.plan) if self._cache is not None else None
        if found is None:
            self._builders.order(order)
        else:
            self._found.append(found)

    def plans(self, progress: Progress) -> Iterator[PlanResult]:
        """Yield what was wanted, each as it is there; raises what `Builders.results` raises."""
        progress.phase("build plans")
        done = 0

        def there(plan: PlanResult, how: str) -> Iterator[PlanResult]:
            """Yield a plan and those that have the same graph."""
            nonlocal done
            for path in self._wanted.get(self._keys.get(plan.path, ""), [plan.path]):
                if path != plan.path:
                    shutil.copyfile(plan.path, path)
                    self.counts.same += 1
                done += 1
                progress.item(f"{path.name} {how if path == plan.path else f'as {plan.path.name}'}", done, self._total)
                yield replace(plan, path=path)

        def waiting(steps: Mapping[str, Step]) -> None:
            if self._total == 1:
                for step in steps.values():
                    progress.step(step.what, step.done, step.total)
            elif steps:
                whats = ", ".join(f"{plan} ({step.what})" for plan, step in steps.items())
                progress.step(whats, done, self._total)

        for plan in self._found:
            self.counts.cached += 1
            yield from there(plan, "from the cache")
        for plan in self._builders.results(waiting):
            self.counts.built += 1
            self._keep(plan)
            how = f"in {plan.seconds:.1f} s"
            if plan.peak_rss_bytes is not None:
                self.peak = max(self.peak or 0, plan.peak_rss_bytes)
                how += f", {format_bytes(plan.peak_rss_bytes)} of memory"
            yield from there(plan, how)

    def _keep(self, plan: PlanResult) -> None:
        key = self._keys.get(plan.path)
        if self._cache is not None and key is not None:
            try:
                self._cache.keep(key, plan)
            except OSError as error:
                self._cache = None
                self.notes.append(_no_cache(error))
