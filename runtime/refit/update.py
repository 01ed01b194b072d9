"""The phases of an update, as vLLM names them: initialise a transport once; then start, update by chunks, finish.

Nothing of the engine changes before an update is complete and fits: the old weights stay where it does not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.specs.schema import Spec

from .chunk import Data, described, of_shared_memory, update_error
from .collective import Collective
from .received import ReceivedCheckpoint


@dataclass(slots=True)
class WeightUpdates:
    """Receives updates for a model, one at a time. Its methods may be called from any thread."""

    spec: Spec
    updates: int = field(default=0, init=False)
    """That were finished."""
    _received: ReceivedCheckpoint | None = field(default=None, init=False)
    _receiving: ReceivedCheckpoint | None = field(default=None, init=False)
    """The update of which a chunk is coming."""
    _collective: Collective | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def running(self) -> bool:
        """Whether an update was started and not finished."""
        return self._received is not None

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Join a trainer's collective: `master_address`, `master_port`, `world_size`, `rank_offset` (this rank)."""
        address, port, size, rank = (
            init_info.get(key) for key in ("master_address", "master_port", "world_size", "rank_offset")
        )
        if not isinstance(address, str) or not (isinstance(port, int) and 0 < port < 1 << 16):
            raise update_error("`master_address` and `master_port` are to say where the trainer waits")
        if not (isinstance(size, int) and isinstance(rank, int) and 0 < rank < size <= 1 << 16):
            raise update_error("`rank_offset` is to be a rank from 1 to below `world_size`: rank 0 is the trainer")
        self._collective = Collective(address, port, size, rank)

    def start_weight_update(self) -> None:
        """Begin; an update that was not finished is forgotten, and what still comes of it is not taken in."""
        self._received = ReceivedCheckpoint(self.spec)

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Receive a chunk: `names`, `dtype_names`, `shapes`, from `shared_memory`, or else from the collective.

        N3CError (E0855, exit code 2) outside of an update, while another chunk is coming, or for what describes no
        tensors; exit code 6 for tensors that are not as described. The update then goes on without those of the chunk
        that did not come.
        """
        tensors = described(*(update_info.get(key) for key in ("names", "dtype_names", "shapes")))
        segment = update_info.get("shared_memory")
        if segment is not None:
            self.receive(of_shared_memory(segment, tensors))
        elif self._collective is not None:
            self.receive(self._collective.receive(tensors))
        else:
            raise update_error("nothing says where from", "`shared_memory`, or init_weight_transfer_engine before")

    def receive(self, data: Data) -> None:
        """Receive tensors with their bytes."""
        with self._exclusively() as received:
            for each, raw in data:
                received.receive(each.name, each.dtype, each.shape, raw)

    def finish_weight_update(self) -> Checkpoint:
        """Return what came, which an engine can take whole; N3CError (exit code 6) with all that does not fit.

        E0855, exit code 2, while a chunk is coming.
        """
        with self._exclusively() as received:
            self._received = None
            received.complete()
        self.updates += 1
        return received

    @contextmanager
    def _exclusively(self) -> Iterator[ReceivedCheckpoint]:
        """Yield the update to the one thread that works on it."""
        with self._lock:
            received = self._received
            if received is None:
                raise update_error("none was started", "call start_weight_update first")
            if self._receiving is received:
                raise update_error("a chunk of it is still coming", "wait until that is answered, or start again")
            self._receiving = received
        try:
            yield received
        finally:
            with self._lock:
                if self._receiving is received:
                    self._receiving = None
