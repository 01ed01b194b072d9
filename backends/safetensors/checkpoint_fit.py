"""Whether a checkpoint belongs to a spec: names, shapes and formats of tensors, and what its config.json says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError, Span
from n3c.passes.lower.model import lower
from n3c.passes.serving import quantize_pass
from n3c.specs.convert import run_import
from n3c.specs.schema import Spec

from .checkpoint import Checkpoint
from .sources import check_fit, check_formats

COMPARED = {
    "model": ("hidden_size", "vocab_size", "norm_eps", "tie_word_embeddings"),
    "mamba": ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "conv_bias"),
    "attention": ("num_heads", "num_kv_heads", "head_dim"),
    "moe": (
        "num_experts",
        "top_k",
        "intermediate_size",
        "shared_intermediate_size",
        "latent_size",
        "routed_scaling_factor",
        "norm_topk_prob",
        "n_group",
        "topk_group",
    ),
    "mlp": ("intermediate_size",),
}
"""Keys that decide what the model computes; several of them change no tensor's shape."""


def fitting_checkpoint(spec: Spec, directory: Path) -> Checkpoint:
    """Open the checkpoint in `directory`; N3CError (exit code 6) with all that does not fit `spec`.

    Only headers and config.json are read.
    """
    checkpoint, program = Checkpoint(directory), lower(spec)
    check_fit(program.parameters.values(), checkpoint)
    quantize_pass(spec).run(program)
    check_formats(program.parameters.values(), checkpoint)
    if (directory / "config.json").is_file():
        _require_same(spec, directory)
    return checkpoint


def _require_same(spec: Spec, directory: Path) -> None:
    place = Span(str(directory / "config.json"))
    try:
        theirs = run_import(directory, formats_matter=False).spec
    except N3CError as error:
        raise N3CError(error.diagnostics, ExitCode.FILE) from error
    help_ = "build with the spec of this checkpoint (`n3c import DIR`)"
    faults = [
        Diagnostic(
            "E0809", f"the checkpoint's config says {key} = {found}, the build's spec {wanted}", place, help=help_
        )
        for key, wanted, found in _differences(spec, theirs)
    ]
    if faults:
        raise N3CError(faults, ExitCode.FILE)


def _differences(ours: Spec, theirs: Spec) -> Iterator[tuple[str, object, object]]:
    """Yield key, our value and theirs; tables that only one has show in the tensors."""
    if ours.model.pattern.symbols != theirs.model.pattern.symbols:
        yield "model.pattern", ours.model.pattern.symbols, theirs.model.pattern.symbols
    for table, keys in COMPARED.items():
        mine, other = getattr(ours, table), getattr(theirs, table)
        if mine is not None and other is not None:
            for key in keys:
                if getattr(mine, key) != getattr(other, key):
                    yield f"{table}.{key}", getattr(mine, key), getattr(other, key)
