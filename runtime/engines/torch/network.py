"""The entry points of serving over the modules of a generated package: what docs/serving.md says of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from n3c.backends.torch.loading import hidden_states

from .operations import Operations
from .states import Places, Rows

Outputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """What the layers of one call share. An input that the entry point does not have is None."""

    lengths: Tensor | None
    """[B] tokens that the states hold."""
    on_host: Sequence[int] | None
    """The same where the host knows it."""
    counts: Tensor | None
    """[B] valid tokens of a chunk; None: all."""
    accepted: Tensor | None
    """[B] pending tokens that count, of `verify`, whose tokens become pending in their place."""
    places: Places | None


class Network:
    """Runs a model whose linears and experts are packed. Inputs and states are on its device, results float32."""

    def __init__(self, model: Any, head: Any, operations: Operations, states: Rows, dtype: torch.dtype) -> None:
        """Take a generated model, the module that gives logits, states, and the type of activations."""
        self._model, self._head, self._operations = model, head, operations
        self._states, self._dtype = states, dtype
        capacities = [keys.data.shape[2] for keys, _ in states.caches.values()]
        self._capacity = capacities[0] if capacities else 0

    def run(self, entry: str, inputs: Mapping[str, Tensor], on_host: Sequence[int] | None) -> Outputs:
        """Run an entry point; states are those after it. `on_host` are the lengths, where the host may read them."""
        call = self._call(inputs, on_host)
        if entry == "draft":
            hidden = inputs["hidden"].to(self._dtype)
            hidden = self._predict(inputs["input_ids"], hidden, call)
            return {"logits": self._logits(hidden), "next_hidden": hidden.float()}
        hidden = self._backbone(inputs["input_ids"], call)
        if "following_ids" in inputs:
            self._fill_caches(inputs["following_ids"], hidden, call)
        if call.counts is not None:
            rows = torch.arange(len(hidden), device=hidden.device)
            hidden = hidden[rows, (call.counts - 1).clamp(min=0)].unsqueeze(1)  # of the last valid token
        return {"logits": self._logits(hidden), "hidden": hidden.float()}

    def _call(self, inputs: Mapping[str, Tensor], on_host: Sequence[int] | None) -> Call:
        lengths, counts = inputs.get("lengths"), inputs.get("counts")
        tokens = inputs["input_ids"].shape[1]
        places = Places.of(lengths, counts, tokens, self._capacity) if lengths is not None else None
        return Call(lengths, on_host, counts, inputs.get("accepted"), places)

    def _backbone(self, ids: Tensor, call: Call) -> Tensor:
        """Return the hidden states [B, T, D] after the last norm."""
        backbone = self._model.backbone
        x, y = self._embed(ids), None
        for index, (symbol, block) in enumerate(zip(self._model.config.pattern, backbone.layers, strict=True)):
            normed, x = self._normed(block.norm, x, y)
            y = self._mix(symbol, f"backbone.layers.{index}", block.mixer, normed, call)
        return self._normed(backbone.norm_f, x, y)[0]

    def _predict(self, ids: Tensor, hidden: Tensor, call: Call) -> Tensor:
        """Return the hidden states of one step of multi-token prediction; `ids` are the tokens after `hidden`."""
        x, y = hidden, None
        layers = self._model.mtp.layers
        for index, (symbol, block) in enumerate(zip(self._model.config.mtp_pattern, layers, strict=True)):
            x = self._joined(block, ids, x) if block.first else x
            normed, x = self._normed(block.norm, x, y)
            y = self._mix(symbol, f"mtp.layers.{index}", block.mixer, normed, call)
        return self._normed(layers[-1].final_layernorm, x, y)[0]

    def _fill_caches(self, ids: Tensor, hidden: Tensor, call: Call) -> None:
        """Write the caches of a step of multi-token prediction: no more is computed than the last of them needs."""
        pattern, x, y = self._model.config.mtp_pattern, hidden, None
        last = pattern.rfind("*")
        for index, block in enumerate(self._model.mtp.layers[: last + 1]):
            label = f"mtp.layers.{index}"
            x = self._joined(block, ids, x) if block.first else x
            normed, x = self._normed(block.norm, x, y)
            if index == last:
                self._write(label, block.mixer, normed, call)
            else:
                y = self._mix(pattern[index], label, block.mixer, normed, call)

    def _joined(self, block: Any, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return what the first block of a step of multi-token prediction reads."""
        norm = self._operations.norm
        joined: Tensor = block.eh_proj(
            torch.cat([norm(block.enorm, self._embed(ids)), norm(block.hnorm, hidden)], dim=-1)
        )
        return joined

    def _normed(self, norm: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the norm of the residual stream, and the stream: x and what the layer before adds to it."""
        return (self._operations.norm(norm, x), x) if y is None else self._operations.add_norm(norm, x, y)

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._model.backbone.embeddings(ids)
        return embedded.to(self._dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden)
        return logits

    def _mix(self, symbol: str, label: str, mixer: Any, x: Tensor, call: Call) -> Tensor:
        """Return what a mixer makes of x [B, T, D]."""
        if symbol == "M":
            return self._mamba(label, mixer, x, call)
        if symbol == "*":
            return self._attention(label, mixer, x, call)
        y: Tensor = hidden_states(mixer(x))
        return y

    def _mamba(self, label: str, mixer: Any, x: Tensor, call: Call) -> Tensor:
        """Continue from the state; `verify` first takes in what was accepted, and leaves its own tokens pending."""
        state, step = self._states.mamba[label], self._operations.mamba_step
        projected: Tensor = mixer.in_proj(x)
        inner = mixer.config.mamba_inner_size
        verifying = call.accepted is not None
        if verifying:
            assert state.pending is not None
            pending = F.pad(state.pending, (inner, 0))  # no z is needed to move a state on
            step(mixer, pending, state.window, state.ssm, call.accepted, advance=True)
            state.pending.copy_(projected[..., inner:])
        y = step(mixer, projected, state.window, state.ssm, call.counts, advance=not verifying)
        result: Tensor = mixer.out_proj(self._operations.gated_norm(mixer.norm, y, projected[..., :inner]))
        return result

    def _attention(self, label: str, mixer: Any, x: Tensor, call: Call) -> Tensor:
        """Write keys and values of the tokens, and attend to what the caches hold."""
        self._write(label, mixer, x, call)
        keys, values = self._states.caches[label]
        q: Tensor = mixer.q_proj(x).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)  # [B, J, T, Z]
        if keys.scale is not None:
            q = (q * keys.scale).to(self._dtype)
        assert call.lengths is not None
        y = self._operations.attention(q, keys.data, values.data, call.lengths, call.on_host)
        if values.scale is not None:
            y = (y * values.scale).to(self._dtype)
        result: Tensor = mixer.o_proj(y.transpose(1, 2).flatten(2))
        return result

    def _write(self, label: str, mixer: Any, x: Tensor, call: Call) -> None:
        assert call.places is not None
        for cache, projection in zip(self._states.caches[label], (mixer.k_proj, mixer.v_proj), strict=True):
            new = projection(x).unflatten(-1, (mixer.num_kv_heads, -1)).transpose(1, 2)  # [B, Y, T, Z]
            cache.write(new, call.places)
