"""The layout of states: where each state of a request lies, and what rejecting drafted tokens costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from n3c.ir.program import Program

ALIGNMENT = 256
"""Bytes: states begin on these, as device allocators give."""


@dataclass(frozen=True, slots=True)
class PlannedState:
    """A state of one request: its place in the request's memory. Sizes in bytes."""

    name: str
    kind: str
    """kv, ssm, conv or pending."""
    layer: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int
    strides: tuple[int, ...]
    """Bytes from one element to the next along each dim; the last is that of an element."""
    entries: tuple[str, ...]
    """Entry points that read and write it."""


@dataclass(frozen=True, slots=True)
class StatePlan:
    """The states of one request in one piece of memory, each on a boundary of `ALIGNMENT` bytes.

    An engine of batch B takes each state as [B, *shape], where a sequence follows the other after `bytes`.
    """

    states: tuple[PlannedState, ...]
    max_seq_len: int
    draft_tokens: int
    total_bytes: int
    """With padding; what a runtime allocates a request."""
    kv_bytes_per_token: int
    """Of the model itself, as published figures count; the MTP block's own cache is the next one."""
    mtp_kv_bytes_per_token: int
    ssm_bytes: int
    conv_bytes: int
    pending_bytes: int

    @property
    def bytes_per_request(self) -> int:
        """Bytes that do not grow with context: SSM states and convolution windows."""
        return self.ssm_bytes + self.conv_bytes

    @property
    def copies_bytes(self) -> int:
        """Bytes that a full copy of SSM states and windows for each drafted token would take."""
        return self.draft_tokens * self.bytes_per_request

    def bytes_at(self, context: int) -> int:
        """Return what a request needs whose caches hold `context` tokens."""
        return (
            self.bytes_per_request
            + self.pending_bytes
            + context * (self.kv_bytes_per_token + self.mtp_kv_bytes_per_token)
        )

    def as_json(self) -> dict[str, Any]:
        """Return the form of `manifest.json`, key `state_plan`."""
        return {
            "max_seq_len": self.max_seq_len,
            "alignment": ALIGNMENT,
            "total_bytes": self.total_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "mtp_kv_bytes_per_token": self.mtp_kv_bytes_per_token,
            "bytes_per_request": self.bytes_per_request,
            "ssm_bytes_per_request": self.ssm_bytes,
            "conv_bytes_per_request": self.conv_bytes,
            "snapshots": self.snapshots(),
            "states": [
                {
                    "name": s.name,
                    "kind": s.kind,
                    "layer": s.layer,
                    "dtype": s.dtype,
                    "shape": list(s.shape),
                    "strides": list(s.strides),
                    "bytes": s.bytes,
                    "offset": s.offset,
                    "entries": list(s.entries),
                }
                for s in self.states
            ],
        }

    def snapshots(self) -> dict[str, int]:
        """Return what taking back drafted tokens costs a request, and what copies of the states would."""
        return {
            "draft_tokens": self.draft_tokens,
            "pending_bytes": self.pending_bytes,
            "full_copies_bytes": self.copies_bytes,
        }


def state_plan(program: Program, max_seq_len: int) -> StatePlan:
    """Lay out the states of one request in the order of layers. `program` has the entry points of serving."""
    verify = program.entry_points.get("verify")
    tokens = verify.tokens if verify else 1
    last = max((call.layer for call in program.entry_points["decode"].calls if call.layer is not None), default=-1)
    planned: list[PlannedState] = []
    totals = Counter[str]()
    end = 0
    users: dict[str, list[str]] = {}
    for entry in program.entry_points.values():
        for name in dict.fromkeys(name for call in entry.calls for name in call.states):
            users.setdefault(name, []).append(entry.name)
    for state in program.states.values():
        type_ = state.type.bind({"B": 1, "S": tokens})
        shape = type_.static_dims[1:]
        planned.append(
            PlannedState(
                name=state.name,
                kind=state.kind,
                layer=state.layer,
                dtype=type_.dtype.value,
                shape=shape,
                bytes=type_.bytes,
                offset=end,
                strides=_strides(shape, type_.dtype.bits // 8),
                entries=tuple(users.get(state.name, ())),
            )
        )
        totals["mtp" if state.kind == "kv" and state.layer > last else state.kind] += type_.bytes
        end += -(-type_.bytes // ALIGNMENT) * ALIGNMENT
    return StatePlan(
        states=tuple(planned),
        max_seq_len=max_seq_len,
        draft_tokens=tokens - 1,
        total_bytes=end,
        kv_bytes_per_token=totals["kv"] // max_seq_len,
        mtp_kv_bytes_per_token=totals["mtp"] // max_seq_len,
        ssm_bytes=totals["ssm"],
        conv_bytes=totals["conv"],
        pending_bytes=totals["pending"],
    )


def _strides(shape: tuple[int, ...], element: int) -> tuple[int, ...]:
    strides: list[int] = []
    for size in reversed(shape):
        strides.append(element)
        element *= size
    return tuple(reversed(strides))
