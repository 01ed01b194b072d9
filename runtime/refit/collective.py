"""Tensors that a trainer broadcasts: a process group of its own, beside whatever groups the process has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chunk import Described, update_error

TIMEOUT = 300
"""Seconds that a member waits for the others."""
SENDER = 0
"""Rank of the trainer that sends."""


class Collective:
    """A member of a group of trainers and engines, over gloo; the trainer of rank 0 sends."""

    def __init__(self, address: str, port: int, world_size: int, rank: int, *, timeout: float = TIMEOUT) -> None:
        """Meet the others at a store that rank 0 keeps at `address`; N3CError (E0855) where they do not come."""
        from torch import distributed

        dist: Any = distributed  # what it has of gloo is not declared
        wait = timedelta(seconds=timeout)
        try:
            store = dist.TCPStore(address, port, world_size, is_master=rank == SENDER, timeout=wait)
            self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, wait)
        except (RuntimeError, ValueError) as error:
            raise update_error(f"no collective at {address}:{port}: {error}") from error

    def send(self, data: NDArray[np.uint8]) -> None:
        """Broadcast bytes from rank 0."""
        self._broadcast(data)

    def receive(self, tensors: Sequence[Described]) -> Iterator[tuple[Described, NDArray[np.uint8]]]:
        """Yield the tensors that rank 0 sends, one after the other."""
        for each in tensors:
            data = np.empty(each.bytes, np.uint8)
            self._broadcast(data)
            yield each, data

    def _broadcast(self, data: NDArray[np.uint8]) -> None:
        import torch
        from torch import distributed

        if not data.nbytes:
            return
        options: Any = distributed.BroadcastOptions()
        options.rootRank = SENDER
        try:
            self._group.broadcast([torch.as_tensor(data)], options).wait()
        except RuntimeError as error:
            raise update_error(f"the collective failed: {error}") from error
