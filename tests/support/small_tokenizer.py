"""A small byte-level tokenizer with the special tokens of Nemotron 3."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from n3c.runtime.generation.tokenizer import Tokenizer, find_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added, and not special."""
VOCAB = 320
END = SPECIAL.index("<|im_end|>")
EOS = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
"""As tokenizer_config.json writes a token that is more than a text."""
SAMPLE = "You are helpful. What is the weather in Paris? system user assistant\n" * 3


def write_tokenizer(folder: Path, template: str | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": EOS}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}), encoding="utf-8")


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return what `write_tokenizer` wrote, as n3c reads it."""
    found = find_tokenizer([folder], VOCAB)
    assert found is not None
    return found
