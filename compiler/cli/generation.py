"""What `n3c run` prints: text as it comes, then figures."""

from __future__ import annotations

from typing import Any

from n3c.runtime.generation.loop import Generation
from n3c.runtime.generation.sequence import Running

from .output import say
from .table import format_bytes


class Printer:
    """Shows the tokens of one sequence as they come; of several, each text when it is whole."""

    def __init__(self, sequences: int, has_text: bool) -> None:
        self._live = sequences == 1
        self._has_text = has_text

    def heard(self, index: int, token: int, piece: str) -> None:
        """Take a new token and the text that became certain."""
        if self._live:
            say(piece if self._has_text else f"{token} ", newline=False)

    def finish(self, generation: Generation) -> None:
        """Show what has not been shown."""
        if self._live:
            say("")
            return
        for i, sequence in enumerate(generation.sequences):
            say(f"[{i + 1}] {text_of(sequence) if self._has_text else ' '.join(map(str, sequence.new))}")


def text_of(sequence: Running) -> str | None:
    """Return the text of a sequence, what is not certain yet too; None without a tokenizer."""
    if sequence.growing is None:
        return None
    sequence.growing.finish()
    return sequence.growing.text


def report(generation: Generation, device: str) -> dict[str, Any]:
    """Return the form of `n3c run --json`; `text` and `token_ids` are those of the first prompt."""
    completions = [
        {
            "text": text_of(sequence),
            "token_ids": sequence.new,
            "finish_reason": sequence.ending,
            "prompt_tokens": len(sequence.prompt),
        }
        for sequence in generation.sequences
    ]
    statistics, held = generation.statistics, generation.engine.allocated()
    interrupted = any(sequence.ending == "interrupted" for sequence in generation.sequences)
    return {
        "ok": not interrupted,
        "text": completions[0]["text"],
        "token_ids": completions[0]["token_ids"],
        "tokens_per_second": round(statistics.tokens_per_second, 3),
        "acceptance_length": round(statistics.acceptance_length, 4),
        "speculative": generation.drafter is not None,
        "device": device,
        "completions": completions,
        "prefill_seconds": round(statistics.prefill_seconds, 4),
        "decode_seconds": round(statistics.decode_seconds, 4),
        "bytes": {"states": held.states, "spare_states": held.spare_states, "weights": held.weights},
        "diagnostics": [],
    }


def summary(generation: Generation) -> str:
    """Return one line of figures."""
    statistics, held = generation.statistics, generation.engine.allocated()
    line = (
        f"{statistics.prompt_tokens} prompt tokens in {statistics.prefill_seconds:.2f} s, {statistics.new_tokens} new"
        f" at {statistics.tokens_per_second:.1f} tokens/s"
    )
    if generation.drafter is not None:
        line += f", {statistics.acceptance_length:.2f} tokens a round"
    return f"{line}; weights {format_bytes(held.weights)}, states {format_bytes(held.states)}"
