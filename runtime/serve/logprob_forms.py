"""Log-probabilities in the two forms that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from n3c.runtime.generation.logprobs import TokenLogprobs
from n3c.runtime.generation.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not."""


def written(tokenizer: Tokenizer, token: int) -> str:
    """Return how a token is shown: its text, or its bytes for a part of a character."""
    held = tokenizer.token_bytes(token)
    try:
        return held.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in held)


def chat_form(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return the form of chats: `{"content": [{token, logprob, bytes, top_logprobs}]}`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        held = list(tokenizer.token_bytes(token))
        return {"token": written(tokenizer, token), "logprob": max(logprob, LEAST), "bytes": held}

    content = [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(*likely) for likely in each.top]} for each in tokens
    ]
    return {"content": content, "refusal": None}


def completion_form(
    tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs], first: int | None = None, offset: int = 0
) -> dict[str, Any]:
    """Return the form of completions: four lists. `first` is the first token of a prompt, which has no log-probability.

    Offsets count characters of the shown tokens from `offset` on.
    """
    texts = ([] if first is None else [written(tokenizer, first)]) + [written(tokenizer, each.token) for each in tokens]
    offsets: list[int] = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    unknown = [None] * (first is not None)
    return {
        "tokens": texts,
        "token_logprobs": [*unknown, *(max(each.logprob, LEAST) for each in tokens)],
        "top_logprobs": [
            *unknown,
            *({written(tokenizer, token): max(logprob, LEAST) for token, logprob in each.top} for each in tokens),
        ],
        "text_offset": offsets,
    }
