"""The sequences of one HTTP request: what the engine's thread brings them is awaited in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType

from .errors import draining, from_n3c, internal, overloaded
from .scheduler import QueueFullError, Ticket, Update, Work
from .service import DrainingError, Service


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn what a service raises that takes nothing into ApiError: 429 or 503."""
    try:
        yield
    except QueueFullError as error:
        raise overloaded() from error
    except DrainingError as error:
        raise draining() from error


class Exchange:
    """Submits sequences, gives their updates, and ends those that still run when it is left."""

    def __init__(self, service: Service, works: Sequence[Work]) -> None:
        self._service = service
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._open = len(works)
        with refusals():
            self.tickets: list[Ticket] = service.submit(works, self._deliver)

    def __enter__(self) -> Exchange:
        """Return the exchange."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close the exchange."""
        self.close()

    def close(self) -> None:
        """End what still runs, before the next round."""
        self._service.cancel(self.tickets)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield the index of a sequence and what a round brought it, until all have ended; ApiError where one fails."""
        while self._open:
            index, update = await self._updates.get()
            if update.ending == "failed":
                raise from_n3c(update.failure) if update.failure is not None else internal()
            if update.ending == "interrupted":
                raise draining()
            self._open -= update.ending is not None
            yield index, update

    def _deliver(self, index: int, update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))
