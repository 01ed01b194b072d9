"""The result of a request: texts and ids, and the figures of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from n3c.runtime.engines.interface import Allocation

from .sequence import Ending


@dataclass(frozen=True, slots=True)
class Piece:
    """A new token, and the text that it made certain: none while a character or a stop string may go on."""

    sequence: int
    """Index of the prompt that it continues."""
    token_id: int
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of one prompt."""

    text: str | None
    """None without a tokenizer."""
    token_ids: tuple[int, ...]
    """The new tokens, with the one that stopped the sequence."""
    finish_reason: Ending | None
    """None for a sequence that has not ended."""
    prompt_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c run --json`, key `completions`."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of a request, partial where it was interrupted."""

    completions: tuple[Completion, ...]
    """In the order of the prompts."""
    device: str
    """`cpu` or `cuda`."""
    engine: str
    """`onnxruntime`, `tensorrt`, `torch` or `reference`."""
    speculative: bool
    """Whether tokens were drafted and verified."""
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    """New tokens a second after prefill, of all sequences together, without the first token of each."""
    acceptance_length: float
    """Tokens a round that were returned: 1 without speculation, at most 1 + draft tokens with it."""
    prefill_seconds: float
    decode_seconds: float
    allocated: Allocation

    @property
    def texts(self) -> list[str | None]:
        """The text after each prompt; None without a tokenizer."""
        return [completion.text for completion in self.completions]

    @property
    def token_ids(self) -> list[list[int]]:
        """The token ids after each prompt."""
        return [list(completion.token_ids) for completion in self.completions]

    @property
    def interrupted(self) -> bool:
        """Whether a sequence was interrupted before its end."""
        return any(completion.finish_reason == "interrupted" for completion in self.completions)

    def as_json(self) -> dict[str, Any]:
        """Return the form of `n3c run --json`; `text` and `token_ids` are those of the first prompt."""
        first, held = self.completions[0], self.allocated
        return {
            "ok": not self.interrupted,
            "text": first.text,
            "token_ids": list(first.token_ids),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "acceptance_length": round(self.acceptance_length, 4),
            "speculative": self.speculative,
            "device": self.device,
            "engine": self.engine,
            "completions": [completion.as_json() for completion in self.completions],
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "bytes": {"states": held.states, "spare_states": held.spare_states, "weights": held.weights},
            "diagnostics": [],
        }
