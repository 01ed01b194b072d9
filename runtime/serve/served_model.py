"""A model as a server offers it: the service that runs it, and what turns requests into work for it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from n3c.runtime.generation.control_tokens import encode_chat, encode_text
from n3c.runtime.generation.grammar import Grammars
from n3c.runtime.generation.reasoning import Reasoning, Tags
from n3c.runtime.generation.tokenizer import Tokenizer
from n3c.runtime.refit.update import WeightUpdates

from .errors import ApiError
from .limits import Limits
from .metrics import Metrics
from .rendering import Renderer
from .service import Service


@dataclass(frozen=True)
class ServedModel:
    """Made once; nothing of it changes but the service."""

    name: str
    service: Service
    tokenizer: Tokenizer
    vocab_size: int
    eos_ids: frozenset[int]
    metrics: Metrics
    renderer: Renderer | None = None
    """None: the checkpoint has no chat template."""
    grammars: Grammars | None = None
    """None: llguidance is not installed."""
    parse_special: bool = False
    """Whether special tokens in a user's text are those tokens."""
    api_key: str | None = None
    weight_updates: WeightUpdates | None = None
    """None: clients may not replace the weights."""
    limits: Limits = field(default_factory=Limits)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tags(self) -> Tags:
        """The thinking tags."""
        return Tags(*(tuple(self.tokenizer.encode(tag, special=False)) for tag in ("<think>", "</think>")))

    def close(self) -> None:
        """End the service, and what runs on it."""
        self.service.stop()
        if self.renderer is not None:
            self.renderer.close()

    def require(self, model: str) -> None:
        """Raise ApiError (404) for the name of another model."""
        if model != self.name:
            message = f"the model `{model}` does not exist; there is `{self.name}`"
            raise ApiError(404, message, param="model", code="model_not_found")

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt that is no chat."""
        return encode_text(self.tokenizer, text, parse_special=self.parse_special)

    def chat(self, messages: Sequence[Mapping[str, object]], variables: Mapping[str, Any]) -> list[int]:
        """Return the ids of a chat.

        ApiError (400) without a template; N3CError (E0840, exit code 2) where it refuses the messages.
        """
        if self.renderer is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        renderer = self.renderer
        return encode_chat(
            self.tokenizer, messages, variables, renderer.literals, renderer.render, parse_special=self.parse_special
        )

    def added_token(self, text: str) -> int | None:
        """Return the id of a token that was added to the vocabulary; None for another text."""
        return self.tokenizer.encode(text, special=False)[0] if text in self.tokenizer.added else None

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends between the thinking tags."""
        return Reasoning(self.tags, None).begin(prompt).used is not None
