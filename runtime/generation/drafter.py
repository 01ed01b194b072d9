"""Drafters propose tokens, which the model verifies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from n3c.runtime.engines.interface import Array, Engine, call

from .sequence import Running
from .speculative import Draft


class Drafter(Protocol):
    """Proposes tokens. A bad one costs time only: the verdict is the model's."""

    def propose(
        self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
    ) -> list[list[Draft]]:
        """Return `count` drafts after the last token of each sequence; no drafts for None.

        `lengths` [B] are the tokens that the states of each row hold: what a call writes for None goes behind them.
        """
        ...


class MtpDrafter:
    """Multi-token prediction: the entry point `draft`, applied to its own output (DeepSeek-V3, arXiv 2412.19437).

    It reads the newest token and the hidden state of the position before. Its cache gets position p from
    (hidden state of p, token p + 1): the first step writes the position of the last committed token, each
    further one the position after it, which `verify` writes again with the main model's hidden states.
    """

    def propose(
        self, engine: Engine, sequences: Sequence[Running | None], lengths: Array, count: int
    ) -> list[list[Draft]]:
        """Draw each token from the drafter's distribution, cut as the model's own is."""
        width = engine.signatures["draft"].inputs["hidden"].shape[-1]
        assert isinstance(width, int)
        ids = np.zeros((len(sequences), 1), np.int64)
        hidden = np.zeros((len(sequences), 1, width), np.float32)
        lengths = lengths.copy()
        running = {i: sequence for i, sequence in enumerate(sequences) if sequence is not None}
        guides = {i: sequence.guide for i, sequence in running.items()}
        for i, sequence in running.items():
            assert sequence.hidden is not None
            ids[i, 0], hidden[i, 0] = sequence.tokens[-1], sequence.hidden
            lengths[i] = sequence.committed - 1
        drafts: list[list[Draft]] = [[] for _ in sequences]
        for _ in range(count):
            outputs = call(engine, "draft", input_ids=ids, hidden=hidden, lengths=lengths)
            for i, sequence in running.items():
                proposed = sequence.choice(outputs["logits"][i, 0], guides[i])
                token = proposed.draw(sequence.generator)
                drafts[i].append(Draft(token, proposed))
                if sequence.ending is None:
                    guides[i] = guides[i].after(token)
                ids[i, 0], hidden[i], lengths[i] = token, outputs["next_hidden"][i], lengths[i] + 1
        return drafts
