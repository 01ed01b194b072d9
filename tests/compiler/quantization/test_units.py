"""Which linears are chosen for, and which of them together."""

from __future__ import annotations

from n3c.compiler.quantization.units import find_linears, find_units
from n3c.specs.schema import Spec
from support.specs import small_spec


def names(spec: Spec, *, mtp: bool = False) -> list[str]:
    return [unit.name for unit in find_units(spec, "nvfp4", 1, mtp=mtp)]


def test_experts_of_a_layer_are_one_and_so_are_q_k_and_v() -> None:
    units = {unit.name: unit for unit in find_units(small_spec(), "nvfp4", 1, mtp=False)}
    qkv = units["backbone.layers.3.mixer.qkv"]
    assert [linear.role for linear in qkv.linears] == ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
    experts = units["backbone.layers.1.mixer.experts"]
    assert [len(linear.tensors) for linear in experts.linears] == [8, 8]
    assert experts.weights == 2 * 8 * 48 * 32
    assert experts.linears[0].tensors[3] == "backbone.layers.1.mixer.experts.3.up_proj.weight"


def test_sensitive_roles_are_never_chosen_for() -> None:
    roles = {linear.role for unit in find_units(small_spec(), "nvfp4", 1, mtp=True) for linear in unit.linears}
    assert not roles & {"moe.router", "mtp.moe.router", "mamba.conv1d", "norm", "mtp.norm", "embedding"}
    assert "mtp.eh_proj" in roles
    assert not any(name.startswith("mtp.") for name in names(small_spec()))


def test_a_tied_head_is_the_embedding_and_stays() -> None:
    tied = small_spec(odd=("initializer_range = 0.1", "initializer_range = 0.1\ntie_word_embeddings = true"))
    assert "lm_head" in names(small_spec())
    assert "lm_head" not in names(tied)
    assert not any("embeddings" in name for name in names(tied))


def test_what_blocks_do_not_divide_has_no_four_bit_form() -> None:
    by_rows = {
        block: {u.name: u.formats for u in find_units(small_spec(), "nvfp4", block, mtp=False)} for block in (1, 16)
    }
    assert by_rows[1]["lm_head"] == ("nvfp4", "fp8", "bf16")
    assert by_rows[16]["lm_head"] == ("fp8", "bf16")  # 97 rows


def test_the_norm_that_a_linear_reads() -> None:
    norms = {linear.module: linear.input_norm for linear in find_linears(small_spec())}
    assert norms["backbone.layers.0.mixer.in_proj"] == "backbone.layers.0.norm.weight"
    assert norms["backbone.layers.0.mixer.out_proj"] == "backbone.layers.0.mixer.norm.weight"
    assert norms["backbone.layers.3.mixer.k_proj"] == "backbone.layers.3.norm.weight"
    assert norms["backbone.layers.1.mixer.fc1_latent_proj"] == "backbone.layers.1.norm.weight"
    assert norms["backbone.layers.1.mixer.experts.*.up_proj"] is None  # reads the latent projection
    assert norms["lm_head"] == "backbone.norm_f.weight"
    standard = {linear.module: linear.input_norm for linear in find_linears(small_spec(latent=False))}
    assert standard["backbone.layers.1.mixer.experts.*.up_proj"] == "backbone.layers.1.norm.weight"
    assert standard["backbone.layers.1.mixer.experts.*.down_proj"] is None
