"""Limits that a build sets a request: number of prompts, context length, token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.specs.schema import Spec


@dataclass(frozen=True, slots=True)
class Capacity:
    """Context length and vocabulary of a build."""

    context_length: int
    """Most tokens of a sequence, prompt and continuation."""
    vocab_size: int

    @staticmethod
    def of(spec: Spec) -> Capacity:
        """Return the limits of `spec`, the same with speculation and without.

        The caches hold `max_seq_len` tokens. The newest token of a sequence is not in them, but `verify` writes all
        its drafts, accepted or not: the last round begins where they still fit.
        """
        drafts = spec.serving.draft_tokens if spec.mtp is not None else 0
        return Capacity(min(spec.serving.max_seq_len, spec.serving.max_seq_len + 1 - drafts), spec.model.vocab_size)

    def require(self, prompts: Sequence[Sequence[int]], batch: int) -> None:
        """Raise N3CError (exit code 2) with all that is wrong with `prompts` for an engine of `batch` sequences."""
        faults: list[Diagnostic] = []
        if not prompts:
            faults.append(Diagnostic("E0802", "there is no prompt"))
        if len(prompts) > batch:
            message = f"{len(prompts)} prompts, but this build is for at most {batch} sequences at once"
            help_ = "give fewer, or build with a larger number in serving.batch_sizes"
            faults.append(Diagnostic("E0803", message, help=help_))
        for i, prompt in enumerate(prompts):
            where = "the prompt" if len(prompts) == 1 else f"prompt {i + 1}"
            if not prompt:
                faults.append(Diagnostic("E0802", f"{where} has no tokens"))
            elif len(prompt) > self.context_length:
                message = f"{where} has {len(prompt):,} tokens, but this build has room for {self.context_length:,}"
                faults.append(Diagnostic("E0802", message, help="build with a larger serving.max_seq_len"))
            wrong = [token for token in prompt if not 0 <= token < self.vocab_size]
            if wrong:
                message = f"{where} holds the token id {wrong[0]}; ids are 0 to {self.vocab_size - 1:,}"
                faults.append(Diagnostic("E0804", message))
        if faults:
            raise N3CError(faults, ExitCode.USAGE)
