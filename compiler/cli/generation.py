"""The output of `n3c run`: text as it comes, then figures."""

from __future__ import annotations

from n3c.compiler.report.units import format_bytes
from n3c.runtime.generation.result import Generated, Piece

from .output import say, say_generated


class Printer:
    """Shows the tokens of one sequence as they come; of several, each text when it is whole."""

    def __init__(self, sequences: int, has_text: bool) -> None:
        self._live = sequences == 1
        self._has_text = has_text

    def show(self, piece: Piece) -> None:
        """Show a new token where it is of the only sequence."""
        if self._live:
            say_generated(piece.text if self._has_text else f"{piece.token_id} ")

    def finish(self, generated: Generated) -> None:
        """Show what has not been shown."""
        if self._live:
            say("")
            return
        for i, completion in enumerate(generated.completions):
            text = completion.text if completion.text is not None else " ".join(map(str, completion.token_ids))
            say_generated(f"[{i + 1}] {text}", newline=True)


def summary(generated: Generated) -> str:
    """Return one line of figures."""
    line = (
        f"{generated.prompt_tokens} prompt tokens in {generated.prefill_seconds:.2f} s, {generated.new_tokens} new"
        f" at {generated.tokens_per_second:.1f} tokens/s"
    )
    if generated.speculative:
        line += f", {generated.acceptance_length:.2f} tokens a round"
    held = generated.allocated
    return f"{line}; weights {format_bytes(held.weights)}, states {format_bytes(held.states)}"
