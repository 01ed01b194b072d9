"""quantize: which rule decides, what the ledger says, and what is refused where."""

from __future__ import annotations

import pytest

from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.ir.program import LedgerEntry, Program
from n3c.passes.lower.model import lower
from n3c.passes.quantize import linear_parameters
from n3c.passes.serving import serve
from n3c.specs.load import load_spec
from n3c.specs.roles import all_roles, not_linear
from support.specs import QUANTIZED, SMALL, SPECS, small_spec, spec_from_text


def ledger(extra: str) -> dict[str, LedgerEntry]:
    return {entry.name: entry for entry in serve(small_spec(extra)).program.ledger}


def table(format_: str, *rules: str, block: str = "[1, 16]") -> str:
    text = f'[quantization]\nformat = "{format_}"\nblock = {block}\n'
    return text + "".join(f"[[quantization.rules]]\n{rule}\n" for rule in rules)


def test_without_a_table_everything_stays() -> None:
    entries = ledger("")
    assert {entry.format for entry in entries.values()} == {"bf16", "f32"}
    assert entries["lm_head.weight"].rule == "no [quantization]"


def test_the_last_matching_rule_decides() -> None:
    rules = (
        'roles = ["*"]\nformat = "bf16"',
        'roles = ["moe.*"]\nformat = "fp8"',
        'roles = ["moe.shared.*"]\nlayers = "last 1"\nformat = "nvfp4"',
    )
    entries = ledger(table("nvfp4", *rules))
    decided = {name: (entry.rule, entry.format) for name, entry in entries.items()}
    assert decided["lm_head.weight"] == ("quantization.rules.0", "bf16")
    assert decided["backbone.layers.1.mixer.gate.weight"] == ("quantization.rules.1", "fp8")
    assert decided["backbone.layers.1.mixer.shared_experts.up_proj.weight"] == ("quantization.rules.1", "fp8")
    assert decided["backbone.layers.7.mixer.shared_experts.up_proj.weight"] == ("quantization.rules.2", "nvfp4")
    assert decided["mtp.layers.1.mixer.shared_experts.up_proj.weight"] == ("quantization.rules.0", "bf16")
    assert decided["backbone.layers.0.norm.weight"] == ("not a linear", "bf16")
    assert decided["backbone.layers.0.mixer.A"] == ("not a linear", "f32")


def test_modules_name_weights_exactly() -> None:
    rule = 'modules = ["backbone.layers.3.mixer.q_proj", "backbone.layers.1.mixer.experts"]\nformat = "fp8"'
    entries = ledger(table("bf16", rule))
    assert {name for name, entry in entries.items() if entry.format == "fp8"} == {
        "backbone.layers.3.mixer.q_proj.weight",
        "backbone.layers.1.mixer.experts.*.up_proj.weight",
        "backbone.layers.1.mixer.experts.*.down_proj.weight",
    }


def test_the_ledger_covers_every_weight_once_with_its_bytes() -> None:
    spec = small_spec(QUANTIZED)
    program = lower(spec)
    entries = serve(spec).program.ledger
    assert [entry.name for entry in entries] == list(program.parameters)
    up = next(e for e in entries if e.name == "backbone.layers.1.mixer.experts.*.up_proj.weight")
    assert up.shape == (8, 48, 32)
    assert up.bytes == 8 * (48 * 32 // 2 + 48 * 32 // 16 + 4)
    in_proj = next(e for e in entries if e.role == "mamba.in_proj")
    assert in_proj.bytes == in_proj.shape[0] * in_proj.shape[1] + 4


@pytest.mark.parametrize(
    ("extra", "code", "line", "text"),
    [
        (
            table("bf16", 'modules = ["backbone.layers.0.mixer.q_proj"]\nformat = "fp8"'),
            "E0401",
            4,
            "matches no weight",
        ),
        (table("bf16", 'roles = ["mamba.*"]\nlayers = "1"\nformat = "fp8"'), "E0401", 4, "in these layers"),
        (
            table("bf16", 'modules = ["backbone.embeddings"]\nformat = "nvfp4"'),
            "E0403",
            4,
            "not the weight of a linear",
        ),
        (
            table("bf16", 'modules = ["backbone.layers.0.norm"]\nformat = "fp8"'),
            "E0403",
            4,
            "not the weight of a linear",
        ),
        (table("bf16", 'modules = ["backbone.layers.3.mixer"]\nformat = "fp8"'), "E0401", 4, "matches no weight"),
        (table("bf16", 'roles = ["lm_head"]\nlayers = "last 1"\nformat = "fp8"'), "E0401", 4, "in these layers"),
        (table("bf16", 'roles = ["mtp.*"]\nlayers = "last 1"\nformat = "fp8"'), "E0401", 4, "in these layers"),
        (table("nvfp4", block="[16, 16]"), "E0405", 2, "do not divide into blocks of 16"),
    ],
)
def test_what_is_refused_where(extra: str, code: str, line: int, text: str) -> None:
    with pytest.raises(N3CError) as caught:
        serve(small_spec("\n" + extra))
    assert caught.value.exit_code == ExitCode.SPEC
    first = caught.value.diagnostics[0]
    assert first.code == code
    assert text in first.message
    assert first.span is not None
    assert first.span.line == SMALL.count("\n") + 1 + line


def test_a_width_that_is_not_a_multiple_of_16() -> None:
    with pytest.raises(N3CError) as caught:
        serve(small_spec(table("nvfp4"), odd=("intermediate_size = 48", "intermediate_size = 50")))
    messages = [d.message for d in caught.value.diagnostics]
    assert any("input width 50 is not a multiple of 16" in m and "experts.*.down_proj" in m for m in messages)
    assert {d.code for d in caught.value.diagnostics} == {"E0404"}


def test_a_role_that_this_model_lacks_is_a_warning() -> None:
    served = serve(small_spec(table("bf16", 'roles = ["mlp.*", "moe.*"]\nformat = "bf16"')))
    assert served.warnings == []
    text = table("bf16", 'roles = ["mlp.*", "moe.*"]\nformat = "bf16"')
    served = serve(small_spec(text, odd=("MEM*E-ME", "MEM*EME")))
    assert [w.code for w in served.warnings] == ["W0402"]


def test_equal_layers_share_one_function() -> None:
    program = serve(small_spec(QUANTIZED)).program
    kinds = {kind: sorted(f.name for f in program.functions.values() if f.kind == kind) for kind in ("mamba2", "moe")}
    assert kinds["mamba2"] == ["mamba2@fp8", "mamba2@fp8.prefill", "mamba2@fp8.verify"]
    assert kinds["moe"] == [
        "moe",  # of the MTP block
        "moe@nvfp4",
        "moe@nvfp4.2",
        "moe@nvfp4.2.prefill",
        "moe@nvfp4.prefill",
    ]


def formats_by_role(program: Program) -> dict[str, set[str]]:
    roles: dict[str, set[str]] = {}
    for entry in program.ledger:
        roles.setdefault(entry.role, set()).add(entry.format)
    return roles


@pytest.mark.parametrize("name", ["super", "ultra"])
def test_the_published_policy(name: str) -> None:
    """Routed experts NVFP4; Mamba and shared experts FP8; attention, latent, router, MTP, ends BF16."""
    roles = formats_by_role(serve(load_spec(SPECS / f"{name}.toml")[0]).program)
    assert roles["moe.experts.up"] == roles["moe.experts.down"] == {"nvfp4"}
    for role in ("mamba.in_proj", "mamba.out_proj", "moe.shared.up", "moe.shared.down"):
        assert roles[role] == {"fp8"}, role
    kept = {"embedding", "lm_head", "moe.router", "moe.latent_down", "moe.latent_up", "mamba.conv1d"}
    kept |= {role for role in roles if role.startswith(("attention.", "mtp."))}
    for role in kept:
        assert roles[role] <= {"bf16", "f32"}, role


def test_nano_keeps_the_mamba_layers_before_attention() -> None:
    program = serve(load_spec(SPECS / "nano.toml")[0]).program
    kept = {e.name.split(".")[2] for e in program.ledger if e.role == "mamba.in_proj" and e.format == "bf16"}
    assert kept == {"4", "11", "18", "25", "32", "41"}  # as in the released NVFP4 checkpoint


TWO_BLOCKS = """[quantization]
format = "bf16"
[[quantization.rules]]
roles = ["mlp.up"]
layers = "1"
format = "nvfp4"
block = {first}
[[quantization.rules]]
roles = ["mlp.up"]
layers = "2"
format = "nvfp4"
block = {second}
"""


@pytest.mark.parametrize(("first", "second", "wrong"), [("[1, 16]", "[16, 16]", 2), ("[16, 16]", "[1, 16]", 1)])
def test_a_layer_that_fits_hides_none_that_does_not(first: str, second: str, wrong: int) -> None:
    """24 rows do not divide into blocks of 16: each weight is judged by the rule that decides it."""
    text = SMALL[: SMALL.index("[mtp]")] + TWO_BLOCKS.format(first=first, second=second)
    text = text.replace("MEM*E-ME", "M--").replace("intermediate_size = 96", "intermediate_size = 24")
    with pytest.raises(N3CError) as caught:
        serve(spec_from_text(text))
    assert caught.value.exit_code == ExitCode.SPEC
    assert len(caught.value.diagnostics) == 1
    fault = caught.value.diagnostics[0]
    assert fault.code == "E0405"
    assert f"`backbone.layers.{wrong}.mixer.up_proj.weight` [24, 64] cannot be nvfp4" in fault.message
    assert f"by `quantization.rules.{wrong - 1}`" in fault.message


def test_equal_misfits_are_one_diagnostic_with_their_number() -> None:
    with pytest.raises(N3CError) as caught:
        serve(small_spec(table("nvfp4"), odd=("intermediate_size = 48", "intermediate_size = 50")))
    down, mtp = list(caught.value.diagnostics)
    assert "`backbone.layers.1.mixer.experts.*.down_proj.weight` [8, 32, 50] and 2 more of this role" in down.message
    assert "`mtp.layers.1.mixer.experts.*.down_proj.weight` [8, 32, 50] cannot be nvfp4" in mtp.message


def test_a_rule_about_routers_means_their_linears() -> None:
    entries = ledger(table("bf16", 'roles = ["moe.router"]\nformat = "fp8"'))
    assert {name for name, entry in entries.items() if entry.format == "fp8"} == {
        "backbone.layers.1.mixer.gate.weight",
        "backbone.layers.4.mixer.gate.weight",
        "backbone.layers.7.mixer.gate.weight",
    }


def test_a_tied_embedding_is_no_linear() -> None:
    """The head multiplies with it, but the embedding looks rows of it up: it stays as it is."""
    tied = small_spec(
        table("fp8"), odd=("initializer_range = 0.1", "initializer_range = 0.1\ntie_word_embeddings = true")
    )
    assert "backbone.embeddings.weight" not in linear_parameters(lower(tied))
    entries = {entry.name: entry for entry in serve(tied).program.ledger}
    assert entries["backbone.embeddings.weight"].rule == "not a linear"


@pytest.mark.parametrize("name", sorted(path.stem for path in SPECS.glob("*.toml")))
def test_roles_of_linears_are_those_that_the_ops_say(name: str) -> None:
    program = lower(load_spec(SPECS / f"{name}.toml")[0])
    linears = linear_parameters(program)
    for parameter in program.parameters.values():
        if parameter.role in all_roles() and parameter.name.endswith(".weight"):
            assert (parameter.name in linears) == (parameter.role not in not_linear()), parameter.name


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ('roles = ["mlp.*"]\nlayers = "first 1"\nformat = "bf16"', "E0401"),
        ('roles = ["lm_head"]\nlayers = "last 1"\nformat = "bf16"', "E0401"),
        ('modules = ["backbone.layers.99.mixer.in_proj"]\nformat = "nvfp4"', "E0401"),
        ('modules = ["backbone.layers.1.mixer.experts.3.up_proj"]\nformat = "nvfp4"', "E0401"),
        ('roles = ["moe.router"]\nformat = "nvfp4"', "E0403"),
        ('modules = ["backbone.layers.0.mixer.conv1d"]\nformat = "mxfp8"', "E0403"),
    ],
)
def test_rules_of_training_are_judged_as_those_of_deployment(rule: str, code: str) -> None:
    text = f'\n[training]\nformat = "nvfp4"\n[[training.rules]]\n{rule}\n'
    with pytest.raises(N3CError) as caught:
        serve(small_spec(text))
    assert caught.value.exit_code == ExitCode.SPEC
    assert len(caught.value.diagnostics) == 1
    fault = caught.value.diagnostics[0]
    assert fault.code == code
    assert "`training.rules.0`" in fault.message
    assert fault.span is not None
    assert fault.span.line == SMALL.count("\n") + 4


def test_a_role_of_training_that_this_model_lacks_is_a_warning() -> None:
    text = '\n[training]\nformat = "bf16"\n[[training.rules]]\nroles = ["mlp.*", "moe.*"]\nformat = "bf16"\n'
    assert serve(small_spec(text)).warnings == []
    (warning,) = serve(small_spec(text, odd=("MEM*E-ME", "MEM*EME"))).warnings
    assert warning.code == "W0402"
    assert "training.rules.0" in warning.message
