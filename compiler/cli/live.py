"""The live line of progress, by rich: time, what is at work, and where a total is known count, rate and time left."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from n3c.ir.text import escaped


class LiveLine:
    """One line that is drawn over and over, and leaves nothing behind."""

    def __init__(self, *, color: bool) -> None:
        counts = [_WithTotal(column) for column in (MofNCompleteColumn(), _Rate(), TimeRemainingColumn(compact=True))]
        self._progress = Progress(
            _Elapsed(), _What(), BarColumn(12), *counts,
            console=Console(stderr=True, no_color=not color), transient=True, expand=True,
        )  # fmt: skip
        self._count = self._progress.add_task("starting", total=None)

    def start(self) -> None:
        """Hide the cursor and draw."""
        self._progress.start()

    def stop(self) -> None:
        """Wipe the line and show the cursor."""
        self._progress.stop()

    def show(self, text: str, done: int = 0, total: int = 0) -> None:
        """Draw `text`; `done` of `total` where there is one."""
        (task,) = self._progress.tasks
        if total != (task.total or 0) or done < task.completed:  # something else is counted now
            self._progress.remove_task(self._count)
            self._count = self._progress.add_task(text, total=total or None, completed=done)
        self._progress.update(self._count, description=text, completed=done)


class _Elapsed(ProgressColumn):
    """Seconds since the command began."""

    def __init__(self) -> None:
        super().__init__()
        self._start: float | None = None

    def render(self, task: Task) -> Text:
        now = task.get_time()
        self._start = now if self._start is None else self._start
        return Text(f"{now - self._start:6.1f} s", style="progress.elapsed")


class _What(ProgressColumn):
    """What is at work: text, as names may hold markup, cut where the line is full."""

    def __init__(self) -> None:
        super().__init__(Column(ratio=1, no_wrap=True, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        return Text(escaped(task.description))


class _Rate(ProgressColumn):
    """Steps a second, or a minute where they are slow."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{60 * speed:.1f}/min", style="progress.data.speed")


class _WithTotal(ProgressColumn):
    """Another column, empty where no total is known."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__(Column(no_wrap=True))
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column(task) if task.total else Text("")
