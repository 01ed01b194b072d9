"""Whether a checkpoint belongs to a spec: one answer in every command, and no key of the schema forgotten."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from n3c.backends.safetensors.checkpoint_fit import NOT_COMPARED, differences, fitting_checkpoint
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.specs.blocks import MoeLayers
from n3c.specs.pattern import Pattern
from n3c.specs.schema import Spec
from support.checkpoints import write_checkpoint
from support.command import n3c
from support.specs import SMALL, small_spec

WRONG = {"layer_norm_epsilon": 1e-3, "routed_scaling_factor": 9.0}
"""Values that change no tensor's shape."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `spec.toml`, its `weights`, the same `other` weights with another config, and a `build`."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "spec.toml").write_text(SMALL, encoding="utf-8")
    for name, changes in (("weights", {}), ("other", WRONG)):
        write_checkpoint(folder / name, small_spec(), shards=1)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | changes))
        (folder / name / "tokenizer.json").unlink()  # an empty one, which `run` refuses first
    result = n3c("build", folder / "spec.toml", "--target", "onnx", "-o", folder / "build", "--json")
    assert result.code == 0, result.err
    return folder


COMMANDS = {
    "build": ("build", "spec.toml", "--target", "onnx"),
    "build embedded": ("build", "spec.toml", "--target", "onnx", "--weights-mode", "embedded"),
    "build torch": ("build", "spec.toml", "--target", "torch"),
    "quantize": ("quantize", "spec.toml"),
    "quantize with formats": ("quantize", "spec.toml", "--set", "quantization.format=fp8"),
    "verify": ("verify", "build"),
    "run": ("run", "build", "--prompt-ids", "1,2"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_config_that_says_another_model_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    command, source, *more = COMMANDS[name]
    arguments = [command, folder / source, *more, "--weights", folder / "other", "--json"]
    if command in ("build", "quantize"):
        arguments += ["-o", tmp_path / "out"]
    result = n3c(*arguments)
    assert (result.code, result.codes) == (6, ["E0809", "E0809"])
    assert "model.norm_eps = 0.001, the spec 1e-05" in result.err
    assert "moe.routed_scaling_factor = 9.0, the spec 2.5" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unquantized", [False, True])
def test_the_checkpoint_of_the_spec_fits(folder: Path, unquantized: bool) -> None:
    assert list(fitting_checkpoint(small_spec(), folder / "weights", unquantized=unquantized))


def keys() -> Iterator[str]:
    """Yield every key of the schema: `name`, `model.hidden_size`, …"""
    spec = small_spec()
    for table in dataclasses.fields(Spec):
        value = getattr(spec, table.name)
        if table.name != "spans":
            yield table.name
            yield from (f"{table.name}.{f.name}" for f in dataclasses.fields(value)) if _is_table(value) else ()


def _is_table(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def test_what_is_not_compared_is_in_the_schema_and_has_a_reason() -> None:
    assert set(NOT_COMPARED) <= set(keys())
    assert all(NOT_COMPARED.values())


@pytest.mark.parametrize("key", [key for key in keys() if "." in key])
def test_every_key_is_compared_or_listed(key: str) -> None:
    """Another value of any key is a difference, unless the key, or its table, is listed with the reason.

    Entries of [[moe.layers]] are differences in the keys that they change.
    """
    spec = small_spec()
    name, _, field = key.partition(".")
    table: Any = getattr(spec, name)
    value = (MoeLayers("1", top_k=1),) if key == "moe.layers" else _other(getattr(table, field))
    changed = dataclasses.replace(spec, **{name: dataclasses.replace(table, **{field: value})})
    found = [found for found, _, _ in differences(spec, changed)]
    key = "moe.top_k" if key == "moe.layers" else key
    assert found == ([] if key in NOT_COMPARED or name in NOT_COMPARED else [key])


def _other(value: object) -> object:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case Pattern():
            return Pattern.parse("M")
        case tuple():
            return (*value, 1)
        case _:
            return 1 if value is None else f"{value}x"


def test_pipeline_cuts_are_no_difference() -> None:
    spec = small_spec()
    cut = dataclasses.replace(spec.model, pattern=Pattern.parse("MEM*|E-ME"))
    assert list(differences(spec, dataclasses.replace(spec, model=cut))) == []


def test_a_quantized_checkpoint_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    result = n3c("quantize", folder / "spec.toml", "--weights", folder / "weights", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    with pytest.raises(N3CError) as caught:
        fitting_checkpoint(small_spec(), tmp_path / "out", unquantized=True)
    assert caught.value.exit_code is ExitCode.FILE
    assert {d.code for d in caught.value.diagnostics} == {"E0605"}
