"""What the tests of train.py's data share: a program of 512 tokens, a real tokenizer, documents."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .generated import imported, tiny_spec, write_generated

VOCABULARY = 512
DOCUMENTS = [
    f"Document {n}: {'the quick brown fox jumps over the lazy dog. ' * (n % 5 + 1)}Grüße, 東京!" for n in range(40)
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
END = SPECIAL.index("</s>")


@contextmanager
def program(folder: Path, vocab_size: int = VOCABULARY) -> Generator[Any]:
    """Import the generated training program of a small model."""
    spec = tiny_spec("M*", mtp=None)
    write_generated(replace(spec, model=replace(spec.model, vocab_size=vocab_size)), folder)
    with imported(folder) as modules:
        yield modules


def make_tokenizer(folder: Path, **config: Any) -> Tokenizer:
    """Write a byte-level BPE tokenizer, trained here, as a checkpoint has it; return it as `tokenizers` reads it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def settings_of(train: Any, data: object, out: Path, *more: str) -> Any:
    """Return the settings of a run of sequences of 16 tokens."""
    given = ["--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "2", "--seq-len", "16"]
    return train.settings.parse_settings("", [*given, "--val-every", "0", *more])
