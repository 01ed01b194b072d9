"""The states of an engine's sequences, by the state plan, and the key and value caches as calls write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from n3c.ir.ops import CACHE_MAX
from n3c.passes.rewrites.stateful import SCALES
from n3c.passes.state_layout import PlannedState, StatePlan

STATE_TYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class MambaState:
    """What a Mamba-2 layer carries from one call to the next."""

    window: Tensor
    """[B, W - 1, X], the last inputs of the convolution."""
    ssm: Tensor
    """[B, H, P, N]."""
    pending: Tensor | None
    """[B, T, X + H], xBC and dt of the tokens of the last `verify`, which are not in the other two yet."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a call lie in caches of C places, the same for every layer.

    A call writes T whole places, none beyond the capacity: those of padding, and those before the call's first token
    where the end of the cache is near, keep what they hold.
    """

    rows: Tensor
    """[B, 1]."""
    places: Tensor
    """[B, T]."""
    token: Tensor
    """[B, T] int64, which token goes to the place."""
    written: Tensor | None
    """[B, T], whether one does; None: to every place."""

    @staticmethod
    def of(lengths: Tensor, counts: Tensor | None, tokens: int, capacity: int) -> Places:
        """Return the places of `tokens` tokens after `lengths` [B], of which `counts` [B] are valid (None: all)."""
        device = lengths.device
        rows = torch.arange(len(lengths), device=device)[:, None]
        if tokens == 1 and counts is None:
            return Places(rows, lengths[:, None], torch.zeros_like(rows), None)
        places = lengths.clamp(max=capacity - tokens)[:, None] + torch.arange(tokens, device=device)
        token = places - lengths[:, None]
        last = tokens if counts is None else counts[:, None]
        return Places(rows, places, token.clamp(min=0), (token >= 0) & (token < last))


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys or values of an attention layer, [B, Y, C, Z]: `data` times `scale`, which is 1 but for FP8."""

    data: Tensor
    scale: Tensor | None

    def write(self, new: Tensor, places: Places) -> None:
        """Put the tokens of `new` [B, Y, T, Z] to their places."""
        if self.scale is not None:
            new = (new / self.scale).clamp(-CACHE_MAX, CACHE_MAX)
        # float8 has neither gather nor where, bytes have
        data, new = _raw(self.data), _raw(new.to(self.data.dtype))
        where = (places.rows, slice(None), places.places)
        if places.written is None:
            data[where] = new.transpose(1, 2)
            return
        index = places.token[..., None, None].expand(-1, -1, data.shape[1], data.shape[3])
        taken = new.transpose(1, 2).gather(1, index)  # [B, T, Y, Z]
        data[where] = torch.where(places.written[..., None, None], taken, data[where])


def _raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@dataclass(frozen=True, slots=True)
class Rows:
    """The states of the first sequences, as mixers use them; views of those of all."""

    mamba: Mapping[str, MambaState]
    """Label of a layer, as `backbone.layers.0` → its state."""
    caches: Mapping[str, tuple[Cache, Cache]]
    """Label of a layer → its keys and values."""


@dataclass(frozen=True, slots=True)
class Copied:
    """States of a sequence, those of Mamba first; of caches, some places."""

    states: Sequence[Tensor]
    places: slice

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(state.nbytes for state in self.states)


class States:
    """The states of `batch` sequences: by layer as mixers use them, by name as the state plan lists them."""

    def __init__(
        self, plan: StatePlan, batch: int, dtype: torch.dtype, device: torch.device, scales: Mapping[str, Tensor]
    ) -> None:
        """Allocate zeros for activations of type `dtype`: all float32 where that is, else of the planned types.

        `scales` are those of FP8 caches, by name: `….k_scale`, `….v_scale`.
        """
        self._batch, self._dtype, self._device = batch, dtype, device
        self._allocated: list[Tensor] = []
        self._planned = {state.name: state for state in plan.states}
        self.mamba = {label: self._mamba(label) for label in self._layers("conv_state")}
        self.caches = {label: self._caches(label, scales) for label in self._layers("k_cache")}

    @property
    def bytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for tensor in self._allocated)

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Zero the states of `sequences`, or all."""
        for tensor in self._allocated:
            for rows in (tensor,) if sequences is None else map(tensor.__getitem__, sequences):
                rows.zero_()

    def rows(self, count: int) -> Rows:
        """Return the states of the first `count` sequences."""
        return Rows(
            {
                label: MambaState(
                    state.window[:count], state.ssm[:count], None if state.pending is None else state.pending[:count]
                )
                for label, state in self.mamba.items()
            },
            {
                label: (Cache(keys.data[:count], keys.scale), Cache(values.data[:count], values.scale))
                for label, (keys, values) in self.caches.items()
            },
        )

    def snapshot(self, row: int, places: slice) -> Copied:
        """Return a copy of the states of a sequence; of its caches, some places."""
        return Copied([part.clone() for part in self._parts(row, places)], places)

    def restore(self, row: int, copied: Copied) -> None:
        """Copy back."""
        for part, state in zip(self._parts(row, copied.places), copied.states, strict=True):
            part.copy_(state)

    def _parts(self, row: int, places: slice) -> list[Tensor]:
        """Return the states of a row, uncopied, caches last: of each [Y, C, Z] some places."""
        mamba = [t for s in self.mamba.values() for t in (s.window, s.ssm, s.pending) if t is not None]
        caches = [_raw(cache.data[row])[:, places] for pair in self.caches.values() for cache in pair]
        return [*(tensor[row] for tensor in mamba), *caches]

    def by_name(self) -> dict[str, Tensor]:
        """Return every state [B, …] in the shape of the state plan, uncopied."""
        named: dict[str, Tensor] = {}
        for label, state in self.mamba.items():
            named |= {f"{label}.conv_state": state.window.mT, f"{label}.ssm_state": state.ssm}
            if state.pending is not None:
                channels = state.window.shape[-1]
                named[f"{label}.conv_pending"] = state.pending[..., :channels]
                named[f"{label}.dt_pending"] = state.pending[..., channels:]
        for label, caches in self.caches.items():
            named |= {f"{label}.{part}": cache.data for part, cache in zip(("k_cache", "v_cache"), caches, strict=True)}
        return named

    def _layers(self, part: str) -> list[str]:
        return [name.removesuffix(f".{part}") for name in self._planned if name.endswith(f".{part}")]

    def _mamba(self, label: str) -> MambaState:
        conv, ssm = (self._planned[f"{label}.{part}"] for part in ("conv_state", "ssm_state"))
        pending = [self._planned.get(f"{label}.{part}") for part in ("conv_pending", "dt_pending")]
        channels, width = conv.shape
        kept = None
        if pending[0] is not None and pending[1] is not None:
            (tokens, _), (_, heads) = pending[0].shape, pending[1].shape
            kept = self._zeros(self._dtype, tokens, channels + heads)
        return MambaState(
            self._zeros(self._type(conv), width, channels), self._zeros(self._type(ssm), *ssm.shape), kept
        )

    def _caches(self, label: str, scales: Mapping[str, Tensor]) -> tuple[Cache, Cache]:
        keys, values = (self._planned[f"{label}.{part}"] for part in ("k_cache", "v_cache"))
        names = [f"{label}.{name}" for name in SCALES]
        k_scale, v_scale = (scales[name] if self._type(keys) == torch.float8_e4m3fn else None for name in names)
        return (
            Cache(self._zeros(self._type(keys), *keys.shape), k_scale),
            Cache(self._zeros(self._type(values), *values.shape), v_scale),
        )

    def _type(self, state: PlannedState) -> torch.dtype:
        return torch.float32 if self._dtype == torch.float32 else STATE_TYPES[state.dtype]

    def _zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        self._allocated.append(torch.zeros(self._batch, *shape, dtype=dtype, device=self._device))
        return self._allocated[-1]
