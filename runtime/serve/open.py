"""`n3c serve`: open a build with the weights of a checkpoint, and serve it over HTTP."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from n3c.backends.progress import SILENT, Progress
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError
from n3c.runtime.build_folder import open_build
from n3c.runtime.engines.choice import ENGINE_HELP, Device, EngineName, require_device
from n3c.runtime.options import Argument, Option, checked, size_of, usage_error

if TYPE_CHECKING:  # these load numpy and the web server
    from n3c.runtime.generation.grammar import Grammars
    from n3c.runtime.generation.tokenizer import Tokenizer

    from .served_model import ServedModel

SIZE = "SIZE"
API_KEY = "N3C_API_KEY"
"""The environment variable of the key: an argument can be read by everyone on the machine."""


@checked
def open_served(
    build: Annotated[Path | str, Argument("BUILD")],
    weights: Annotated[Path | str | None, Option("Checkpoint directory or hub id; must fit the build.")],
    *,
    name: Annotated[str | None, Option("What clients call the model (default: the spec's name).")] = None,
    no_mtp: Annotated[bool, Option("Decode token by token, without drafts.")] = False,
    device: Annotated[Device, Option("Where to run.")] = "cpu",
    engine: Annotated[EngineName | None, Option(ENGINE_HELP)] = None,
    cache_memory: Annotated[str, Option("Memory for states of prompts that were read before.", metavar=SIZE)] = "1GB",
    no_prefix_cache: Annotated[bool, Option("Read every prompt from its first token on.")] = False,
    parse_special: Annotated[bool, Option("Let special tokens in a user's text be those tokens.")] = False,
    queue: Annotated[int, Option("Sequences that may wait; beyond them status 429.", least=0, most=10**6)] = 256,
    max_body: Annotated[str, Option("Largest body of a request.", metavar=SIZE)] = "8MB",
    max_n: Annotated[int, Option("Most choices of a request.", least=1, most=10**4)] = 16,
    api_key: Annotated[
        str | None, Option(f"Key that clients must send; better in the environment, as {API_KEY}.", metavar="KEY")
    ] = None,
    allow_weight_updates: Annotated[
        bool, Option("Let clients with the key replace the weights, as reinforcement learning does.")
    ] = False,
    progress: Progress = SILENT,
) -> "ServedModel":
    """Open a build to be served; its service runs until `close` is called.

    N3CError: exit code 2 without weights or for an engine that does not run on the device, 4 where the device or a
    package is not there, 6 where the build is damaged, the weights do not fit or there is no tokenizer.
    """
    require_packages()
    if engine is not None:
        require_device(engine, device)
    if name is not None and not name.isprintable():
        raise usage_error(f"--name: {name!r} has characters that are none to print")
    key = os.environ.get(API_KEY) or None if api_key is None else api_key
    if key is not None and re.fullmatch("[!-~]+", key) is None:
        raise usage_error("the API key must be of ASCII's printable characters, without spaces, one at least")
    if allow_weight_updates and key is None:
        raise usage_error(f"--allow-weight-updates needs --api-key, or {API_KEY} in the environment")
    memory, body = size_of("--cache-memory", cache_memory), size_of("--max-body", max_body)
    from n3c.backends.safetensors.locate import checkpoint_directory
    from n3c.runtime.generation.batch import Batch
    from n3c.runtime.generation.capacity import Capacity
    from n3c.runtime.generation.chat_template import find_chat_template
    from n3c.runtime.generation.prefix_cache import PrefixCache
    from n3c.runtime.generation.prompts import required
    from n3c.runtime.generation.runner import open_runner, require_weights
    from n3c.runtime.generation.tokenizer import find_tokenizer
    from n3c.runtime.refit.update import WeightUpdates

    from .limits import Limits
    from .metrics import Metrics
    from .rendering import Renderer
    from .scheduler import Scheduler
    from .served_model import ServedModel
    from .service import Service

    progress.phase("open")
    opened = open_build(Path(build))
    folder = require_weights(None if weights is None else checkpoint_directory(weights))
    template = find_chat_template(folder)
    vocabulary = opened.spec.model.vocab_size
    tokenizer = required(find_tokenizer([folder], vocabulary), folder)
    progress.phase("load")
    runner = open_runner(
        opened,
        folder,
        device=device,
        engine=engine,
        sequences=max(opened.spec.serving.batch_sizes),
        continuous=True,
        speculate=not no_mtp,
        progress=progress,
    )
    cache = None if no_prefix_cache else PrefixCache(memory, runner.drafter is not None)
    batch = Batch(runner.engine, Capacity.of(opened.spec), runner.drafter, cache)
    metrics, limits = Metrics(), Limits(queue=queue, body_bytes=body, choices=max_n)
    service = Service(Scheduler(batch, tokenizer, queue, metrics))
    metrics.watch(service.scheduler, lambda: service.waiting)
    return ServedModel(
        name=name or opened.spec.name,
        service=service.start(),
        tokenizer=tokenizer,
        vocab_size=vocabulary,
        eos_ids=runner.eos_ids,
        metrics=metrics,
        renderer=None if template is None else Renderer(template, limits.template_seconds, limits.template_bytes),
        grammars=_grammars(tokenizer, vocabulary, runner.eos_ids),
        parse_special=parse_special,
        api_key=key,
        weight_updates=WeightUpdates(opened.spec) if allow_weight_updates else None,
        limits=limits,
    )


def require_packages() -> None:
    """Raise N3CError (E0509, exit code 4) where a package of the extra `serve` is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("starlette", "uvicorn", "pydantic", "prometheus_client") if find_spec(name) is None]
    if missing:
        message = f"the Python package `{missing[0]}` is not installed"
        raise N3CError(Diagnostic("E0509", message, help="pip install 'n3c[serve]'"), ExitCode.TARGET)


def _grammars(tokenizer: "Tokenizer", vocabulary: int, ends: frozenset[int]) -> "Grammars | None":
    """Return what compiles schemas, or None without llguidance: then `response_format` is refused."""
    from importlib.util import find_spec

    from n3c.runtime.generation.grammar import Grammars

    return None if find_spec("llguidance") is None else Grammars.of(tokenizer, vocabulary, ends)
