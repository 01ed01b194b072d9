"""The torch backend: a spec becomes a standalone PyTorch model, its training program and config.json."""

from __future__ import annotations

import json
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from n3c.specs.huggingface import export_config
from n3c.specs.schema import Spec

from .context import template_context
from .engines import engine_files

TRAINER = (
    *("train.py", "settings.py", "world.py", "parallelize.py", "collectives.py", "weights.py", "data.py"),
    *("optimizer.py", "checkpointing.py", "metrics.py", "faults.py"),
)
"""The training program: train.py is what one runs, the others what it is made of."""


def emit(spec: Spec, spec_sha256: str, flops_per_token: tuple[int, int] = (0, 0)) -> dict[str, str]:
    """Return the files of `OUT/torch/`: name → text.

    `model.py` needs torch and safetensors only, `train.py` also what lies beside it (TRAINER); all are formatted,
    typed, and depend on nothing but the arguments. `numerics.py` is there where [training] asks for low precision: it
    emulates that, and `blackwell.py` has Transformer Engine do it. `spec_sha256` is the hash of the resolved spec, 64
    hexadecimal digits, and stands in the headers. `flops_per_token` is what a token's forward pass costs, and what each
    token of context adds: train.py reports FLOPs a second by it. Raises N3CError (E0510) for what a validated spec
    cannot hold.
    """
    context = template_context(spec, spec_sha256, flops_per_token)
    names = ["model.py", *TRAINER] + (["numerics.py", "blackwell.py"] if context["formats"] else [])
    names += ["modeling_n3c.py"] if context["wrapped"] else []
    variables = dict.fromkeys(names, context)
    variables |= {name: {**context, **own} for name, own in engine_files(spec).items()}
    files = {name: _environment().get_template(f"{name}.jinja").render(values) for name, values in variables.items()}
    return {**files, "config.json": json.dumps(export_config(spec), indent=2) + "\n"}


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("n3c.backends.torch", "templates"),
        undefined=StrictUndefined,
        autoescape=False,  # it is Python; `context` lets only literals and identifiers through
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
