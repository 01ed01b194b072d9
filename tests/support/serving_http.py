"""Servers for tests: of a small real model, and of a stand-in that says what it is told to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from n3c.runtime.engines.interface import Array
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.chat_template import ChatTemplate, find_chat_template
from n3c.runtime.generation.drafter import MtpDrafter
from n3c.runtime.generation.grammar import Grammars
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.tokenizer import Tokenizer
from n3c.runtime.serve.http_server import HttpServer, bound
from n3c.runtime.serve.limits import Limits
from n3c.runtime.serve.metrics import Metrics
from n3c.runtime.serve.open import open_served
from n3c.runtime.serve.rendering import Renderer
from n3c.runtime.serve.scheduler import Scheduler
from n3c.runtime.serve.served_model import ServedModel
from n3c.runtime.serve.service import Service
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.fake_engine import FakeEngine, Logits
from support.small_tokenizer import VOCAB, open_tokenizer, write_tokenizer
from support.specs import SMALL, spec_from_text

TEMPLATE = (Path(__file__).parents[1] / "runtime/generation/templates/nemotron_3_nano.jinja").read_text()
TEXT = (
    SMALL.replace('"MEM*E-ME"', '"M*E"')
    .replace("max_position_embeddings = 64", "max_position_embeddings = 1024")
    .replace("vocab_size = 97", f"vocab_size = {VOCAB}")
    .replace("max_seq_len = 32", "batch_sizes = [1, 2, 4]\nmax_seq_len = 512\nprefill_chunk = 16\ndraft_tokens = 2")
).lstrip()


def write_build(folder: Path) -> tuple[Path, Path]:
    """Write a build and a checkpoint with random weights, a tokenizer and a chat template; return both folders."""
    (folder / "spec.toml").write_text(TEXT)
    write_checkpoint(folder / "weights", spec_from_text(TEXT), shards=1)
    write_tokenizer(folder / "weights", TEMPLATE)
    assert n3c("build", folder / "spec.toml", "--target", "torch", "-o", folder / "out").code == 0
    return folder / "out", folder / "weights"


def small_served(folder: Path, **options: Any) -> ServedModel:
    """Return a served model of `write_build`'s folder."""
    return open_served(folder / "out", folder / "weights", name="small", **options)


def scripted_served(
    folder: Path, model: Logits, *, drafts: bool = True, limits: Limits | None = None, context: int = 4096
) -> ServedModel:
    """Return a served stand-in with the tokenizer in `folder`; any function of the tokens is its model."""
    engine, template = FakeEngine(model, batch_sizes=(1, 2, 4), chunk=16), find_chat_template(folder)
    return served_engine(engine, Capacity(context, VOCAB), open_tokenizer(folder), template, drafts, limits)


def served_engine(
    engine: Any,
    capacity: Capacity,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    drafts: bool,
    limits: Limits | None,
) -> ServedModel:
    """Return an engine as a served model."""
    limits = limits or Limits()
    batch = Batch(engine, capacity, MtpDrafter() if drafts else None, PrefixCache(1 << 20, drafts))
    metrics = Metrics()
    service = Service(Scheduler(batch, tokenizer, limits.queue, metrics)).start()
    metrics.watch(service.scheduler, lambda: service.waiting)
    ends = frozenset(tokenizer.encode("<|im_end|>", special=False))
    renderer = None if template is None else Renderer(template, limits.template_seconds, limits.template_bytes)
    grammars = Grammars.of(tokenizer, VOCAB, ends)
    return ServedModel("small", service, tokenizer, VOCAB, ends, metrics, renderer, grammars, limits=limits)


def saying(tokenizer: Tokenizer, answers: Sequence[str]) -> Logits:
    """Return a model that answers the n-th turn of a chat with the n-th text, and ends it."""
    start = tokenizer.encode("<|im_start|>assistant\n", special=False)
    think = tokenizer.encode("<think>\n", special=False)
    spelled = [tokenizer.encode(answer + "<|im_end|>", special=False) for answer in answers]

    def model(tokens: Sequence[int]) -> Array:
        tokens = list(tokens)
        begins = [at for at in range(len(tokens)) if tokens[at : at + len(start)] == start]
        said = tokens[begins[-1] + len(start) :] if begins else []
        said = said[len(think) :] if said[: len(think)] == think else said
        answer = spelled[(len(begins) - 1) % len(spelled)]
        logits = np.zeros(VOCAB, np.float32)
        logits[answer[min(len(said), len(answer) - 1)]] = 50
        return logits

    return model


@contextlib.contextmanager
def listening(served: ServedModel, *, grace: float = 5.0) -> Generator[HttpServer]:
    """Run a server on a thread; it has ended when the block is left."""
    server, ready = HttpServer(served, bound("127.0.0.1", 0), grace=grace), threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,))
    thread.start()
    assert ready.wait(60), "the server does not start"
    try:
        yield server
    finally:
        server.end()
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def guarded(served: ServedModel, **changes: Any) -> ServedModel:
    """Return a served model with other settings."""
    return replace(served, **changes)
