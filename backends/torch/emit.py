"""The torch backend: a spec becomes one standalone PyTorch file and its config.json."""

from __future__ import annotations

import json
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from n3c.specs.huggingface import export_config
from n3c.specs.schema import Spec

from .context import template_context


def emit(spec: Spec, spec_sha256: str) -> dict[str, str]:
    """Return the files of `OUT/torch/`: name → text.

    `model.py` needs torch and safetensors only; it is formatted, typed, and depends on nothing but
    the arguments. `spec_sha256` is the hash of the resolved spec, 64 hexadecimal digits, and
    stands in the header. Raises N3CError (E0510) for what a validated spec cannot hold.
    """
    model = _environment().get_template("model.py.jinja").render(template_context(spec, spec_sha256))
    return {"model.py": model, "config.json": json.dumps(export_config(spec), indent=2) + "\n"}


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
