"""The torch backend: a spec becomes a standalone PyTorch package, its training program and config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from functools import cache, partial

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from n3c.ir.extensions import guarded, owner
from n3c.specs.block_kind import OWN_TEMPLATES, BlockKind
from n3c.specs.huggingface import export_config
from n3c.specs.schema import Spec

from .context import LINE_LENGTH, SpecView, spec_view
from .engines import MegatronView, TitanView, engine_files

TRAINING = (
    *("__init__.py", "trainer.py", "settings.py", "world.py", "parallelize.py", "collectives.py"),
    *("weights.py", "initialization.py", "card.py"),
    *("data.py", "tokens.py", "sources.py", "file_kinds.py", "token_files.py", "token_cache.py"),
    *("documents.py", "tokenizer.py", "chat.py"),
    *("distillation.py", "roles.py", "optimizer.py", "muon.py", "average.py", "checkpointing.py"),
    *("metrics.py", "boards.py", "profiling.py", "faults.py"),
)
"""The parts of train.py, in the folder `training` of the package."""


def emit(spec: Spec, spec_sha256: str, flops_per_token: tuple[int, int] = (0, 0)) -> dict[str, str]:
    """Return the files of `OUT/torch/`: path below that → text.

    The package, called by `package_name`, needs torch and safetensors only; `train.py`, beside it, trains it. All are
    formatted, typed, and depend on nothing but the arguments. `numerics.py` is written where [training] asks for low
    precision: it emulates that, and `blackwell.py` has Transformer Engine do it. `spec_sha256` is the hash of the
    resolved spec, 64 hexadecimal digits, and stands in the headers. `flops_per_token` is what a token's forward pass
    costs, and what each token of context adds: train.py reports FLOPs a second by it. Raises N3CError (E0510) for what
    a validated spec cannot hold.
    """
    view = spec_view(spec, spec_sha256, flops_per_token)
    files = {f"{view.package}/{name}": _render(f"package/{name}", view) for name in package_files(view)}
    files["train.py"] = _render("train.py", view)
    for name, own in engine_files(spec).items():
        files[name] = _render(name, view, own)
    return {**files, "config.json": json.dumps(export_config(spec), indent=2) + "\n"}


def package_files(view: SpecView) -> list[str]:
    """Return the files of the package, which depend on what the spec uses."""
    names = [
        "__init__.py",
        "model.py",
        "dispatch.py",
        "float32.py",
        "loss.py",
        "sequences.py",
        "recompute.py",
        "norm.py",
        "state.py",
        *view.files,
        "checkpoint.py",
        "quantized.py",
        "huggingface.py",
    ]
    names += ["modeling_n3c.py"] if view.wrapped else []
    names += ["callbacks.py"] if view.wrapped and view.uses.moe else []
    names += ["numerics.py", "blackwell.py"] if view.formats else []
    names += [f"kernels/{name}" for name in kernel_files(view)]
    return names + [f"training/{name}" for name in TRAINING]


def kernel_files(view: SpecView) -> list[str]:
    """Return the files of the package's folder `kernels`, in Triton."""
    names = ["__init__.py", "activation.py", "adamw.py", "cross_entropy.py", "norm.py"]
    names += ["precision.py"] if view.uses.mamba or view.uses.moe else []
    names += ["convolution.py", "mamba2.py", "ssd.py"] if view.uses.mamba else []
    return names + (["experts.py", "grouped.py"] if view.uses.moe else [])


def _render(name: str, *views: SpecView | TitanView | MegatronView) -> str:
    variables = {field.name: getattr(view, field.name) for view in views for field in fields(view)}
    kinds: tuple[BlockKind, ...] = variables["blocks"]
    environment = _environment(tuple(dict.fromkeys([OWN_TEMPLATES, *(kind.templates for kind in kinds)])))
    imports = {"import_lines": variables["package"], "relative_import_lines": ""}
    functions = {function: partial(_import_lines, package) for function, package in imports.items()}

    def render() -> str:
        return environment.get_template(f"{name}.jinja").render({**variables["tables"], **variables, **functions})

    entry = next((entry for kind in kinds if (entry := owner(kind.templates))), None)
    return guarded(entry, render)() if entry else render()


def _import_lines(package: str, module: str, names: Sequence[str]) -> str:
    """Return the import of names of a module of the package, formatted."""
    line = f"from {package}{module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {package}{module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


@cache
def _environment(packages: tuple[str, ...]) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "templates") for package in packages]),
        undefined=StrictUndefined,
        autoescape=False,  # it is Python; `context` lets only literals and identifiers through
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
