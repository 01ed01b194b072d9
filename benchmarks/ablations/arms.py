"""The arms that are compared: each is a spec, how train.py is called, and what is changed in numerics.py.

All arms train the same number of steps on the same text. Arms of a question differ from its baseline
in the one thing that their name says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from n3c.specs.blocks import Moe
from n3c.specs.load import load_spec
from n3c.specs.schema import Mtp, Spec, Training

SPEC = Path(__file__).parents[2] / "specs" / "tiny.toml"


@dataclass(frozen=True, slots=True)
class Arm:
    """One model and recipe, trained with every seed."""

    name: str
    label: str
    spec: Spec
    numerics: str = "float32"
    switches: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Constants of numerics.py that are set before the run, by Transformer Engine's names."""


@dataclass(frozen=True, slots=True)
class Question:
    """Arms that are compared, the first one with the others."""

    name: str
    title: str
    arms: tuple[Arm, ...]


def questions() -> list[Question]:
    """Return the questions in the order of the report."""
    spec = base()
    latent = Arm("latent", "LatentMoE, α = 2: 32 experts, top 4, latent 64", spec)
    return [
        Question(
            "latent-moe",
            "LatentMoE against standard MoE",
            (
                Arm("standard", "standard MoE: 16 experts, top 2", with_moe(spec, 1)),
                latent,
                Arm("latent4", "LatentMoE, α = 4: 64 experts, top 8, latent 32", with_moe(spec, 4)),
            ),
        ),
        Question(
            "mtp",
            "Multi-token prediction",
            (
                replace(latent, label="without"),
                Arm("mtp1", "depth 1", with_mtp(spec, 1)),
                Arm("mtp2", "depth 2", with_mtp(spec, 2)),
            ),
        ),
        Question(
            "nvfp4",
            "NVFP4 training, emulated",
            (
                Arm("bf16", "BF16", spec, "bf16"),
                Arm("nvfp4", "NVFP4, the whole recipe", spec, "nvfp4"),
                Arm("no-2d", "weights in 1 x 16 blocks", spec, "nvfp4", {"DISABLE_2D_QUANTIZATION": True}),
                Arm("no-rht", "no random Hadamard transform", spec, "nvfp4", {"DISABLE_RHT": True}),
                Arm("no-sr", "gradients rounded to nearest", spec, "nvfp4", {"DISABLE_STOCHASTIC_ROUNDING": True}),
                Arm("all-nvfp4", "no layer excluded", with_everything_nvfp4(spec), "nvfp4"),
            ),
        ),
    ]


def base() -> Spec:
    """Return specs/tiny.toml without MTP: LatentMoE with α = 2."""
    return with_moe(replace(load_spec(SPEC)[0], mtp=None), 2)


def with_moe(spec: Spec, alpha: int) -> Spec:
    """Return `spec` with α times the experts, α times as many a token, in a latent width of 1/α.

    As in arXiv 2601.18089: the routed experts have the same parameters in all, the same active ones,
    and a token sends the same bytes to them. The shared expert gives up, in steps of 16, what the
    latent projections and the wider router cost, so that the active parameters are equal, too.
    α = 1 is a standard MoE.
    """
    width, inner, shared = spec.model.hidden_size, 128, 256
    latent = width // alpha
    experts, top_k = 16 * alpha, 2 * alpha
    extra = (2 * width * latent if alpha > 1 else 0) + (experts - 16) * width
    moe = Moe(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=inner,
        shared_intermediate_size=shared - round(extra / (2 * width) / 16) * 16,
        latent_size=latent if alpha > 1 else None,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    return replace(spec, moe=moe)


def with_mtp(spec: Spec, depth: int) -> Spec:
    """Return `spec` with a shared MTP block that is applied `depth` times."""
    mtp = load_spec(SPEC)[0].mtp
    assert mtp is not None
    return replace(spec, mtp=Mtp(mtp.pattern, depth, mtp.loss_scaling_factor))


def with_everything_nvfp4(spec: Spec) -> Spec:
    """Return `spec` with the rules of [training] left out: every linear trains in NVFP4."""
    return replace(spec, training=Training("nvfp4", (16, 16)))
