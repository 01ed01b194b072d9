"""The Python API: light to import, silent, and the same as the commands, which are made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Any

import click
import pytest

import n3c.compiler
from n3c.compiler import build, check, diff, export_config, import_config, inspect, quantize, repro, simulate
from n3c.compiler.cli.main import command_module
from n3c.ir.diagnostics import ExitCode, N3CError
from n3c.runtime import load, verify
from n3c.runtime.generation.model import Model
from n3c.runtime.options import Argument, parameters_of
from n3c.specs.load import load_spec
from support.checkpoints import write_checkpoint
from support.command import n3c as run
from support.command import write_small
from support.progress import Recorded
from support.specs import SMALL, spec_from_text

MEASURED = {"seconds", "peak_rss_bytes", "tokens_per_second", "prefill_seconds", "decode_seconds"}
"""What differs from one run to the next."""

COMMANDS: dict[str, tuple[Callable[..., object], ...]] = {
    "check": (check,),
    "inspect": (inspect,),
    "diff": (diff,),
    "build": (build,),
    "quantize": (quantize,),
    "verify": (verify,),
    "repro": (repro,),
    "run": (load, Model.generate),
    "simulate": (simulate,),
    "import": (import_config,),
    "export-config": (export_config,),
}
OF_THE_COMMAND_LINE = {"--json", "--quiet", "--verbose", "--debug", "--print-ir-after", "--prompt", "--prompt-ids",
                       "--prompt-file", "--format", "--warnings-as-errors", "--ir", "--exit-code"}  # fmt: skip
"""Options about printing and about where prompts come from: Python has its own ways."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a byte-level spec, its build `out` and its checkpoint `weights`."""
    folder = tmp_path_factory.mktemp("api")
    text = SMALL.replace('"MEM*E-ME"', '"M*E"').replace("vocab_size = 97", "vocab_size = 256")
    text = text.replace("[serving]", "[serving]\nbatch_sizes = [1, 2]\nprefill_chunk = 8\ndraft_tokens = 2")
    (folder / "spec.toml").write_text(text.lstrip(), encoding="utf-8")
    write_checkpoint(folder / "weights", spec_from_text(text), shards=1)
    (folder / "weights" / "tokenizer.json").unlink()
    build(folder / "spec.toml", target="torch", output=folder / "out")
    return folder


def plain(data: dict[str, Any]) -> Any:
    """Return what JSON makes of `data`, without what is measured."""
    return json.loads(json.dumps({key: value for key, value in data.items() if key not in MEASURED}))


def test_importing_loads_next_to_nothing() -> None:
    script = "import sys, n3c.compiler, n3c.runtime; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = done.stdout.split()
    assert not {"torch", "numpy", "click", "rich", "onnx", "dataclasses"} & set(loaded)
    assert {name for name in loaded if name.startswith("n3c")} == {"n3c", "n3c.compiler", "n3c.runtime"}


def test_every_name_is_there_and_no_other() -> None:
    for module in (n3c.compiler, import_module("n3c.runtime")):
        assert all(getattr(module, name) == getattr(module, name) for name in module.__all__)
        with pytest.raises(AttributeError, match="frob"):
            module.frob  # noqa: B018
    assert run("--version").out == f"n3c {n3c.compiler.__version__}\n"


def test_the_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "n3c.compiler", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"n3c {n3c.compiler.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_functions(name: str) -> None:
    command: click.Command = import_module(f"n3c.compiler.cli.commands.{command_module(name)}").command
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    described = [parameter for function in COMMANDS[name] for parameter in parameters_of(function)]
    flags = {f"--{p.name.replace('_', '-')}" for p in described if not isinstance(p.described, Argument)}
    assert {option for option in options if option.startswith("--")} - OF_THE_COMMAND_LINE == flags
    for parameter in described:
        if isinstance(parameter.described, Argument):
            assert options[parameter.name].required == parameter.required
            continue
        option = options[f"--{parameter.name.replace('_', '-')}"]
        assert isinstance(option, click.Option)
        assert (option.required, option.help) == (parameter.required, parameter.described.help)
        if option.show_default:
            assert option.default == parameter.default
        else:
            assert parameter.default in ((), None, False, Parameter.empty)


def test_every_result_is_the_json_of_its_command(folder: Path, tmp_path: Path) -> None:
    spec, out, weights = folder / "spec.toml", folder / "out", folder / "weights"
    assert plain(check(spec, target="trt", sm=(80, 86), context=16, batch=2).as_json()) == plain(
        run("check", spec, "--target", "trt", "--sm", "80,86", "--context", 16, "--batch", 2, "--json").data
    )
    assert plain(inspect(spec, context=16).as_json()) == plain(run("inspect", spec, "--context", 16, "--json").data)
    for held in (out, weights):
        assert plain(inspect(held).as_json()) == plain(run("inspect", held, "--json").data)
    made = tmp_path / "made"
    changes = ("moe.top_k=2", "serving.batch_sizes=[1]")
    built = build(spec, target="onnx", output=made, entry=["decode"], set=changes)
    overrides = [text for change in changes for text in ("--set", change)]
    again = run("build", spec, "--target", "onnx", "-o", made, "--entry", "decode", *overrides, "--json")
    assert plain(built.as_json()) == plain(again.data)
    assert plain(repro(made).as_json()) == plain(run("repro", made, "--json").data)
    assert plain(export_config(spec).as_json()) == plain(run("export-config", spec, "--json").data)
    config = tmp_path / "config.json"
    export_config(spec, output=config)
    assert plain(import_config(config).as_json()) == plain(run("import", config, "--json").data)
    generated = load(out, weights).generate("ab", max_new_tokens=7, stop_ids=[300])
    options = ("--prompt", "ab", "--max-new-tokens", 7, "--stop-ids", 300)
    assert plain(generated.as_json()) == plain(run("run", out, "--weights", weights, *options, "--json").data)
    assert plain(verify(out, weights=weights, seed=3).as_json()) == plain(
        run("verify", out, "--weights", weights, "--seed", 3, "--json").data
    )


def test_quantize_is_its_command(tmp_path: Path) -> None:
    path = write_small(tmp_path)
    write_checkpoint(tmp_path / "weights", load_spec(path)[0], shards=1)
    api = quantize(path, weights=tmp_path / "weights", output=tmp_path / "a", block="1x16").as_json()
    command = ("quantize", path, "--weights", tmp_path / "weights", "-o", tmp_path / "b", "--block", "1x16", "--json")
    results = [
        json.loads(json.dumps(plain(data)).replace(str(tmp_path / out), "OUT"))
        for out, data in (("a", api), ("b", run(*command).data))
    ]
    assert results[0] == results[1]
    assert results[0]["formats"]["w4a16_nvfp4"]["weights"] > 0


def test_a_loaded_spec_is_as_good_as_its_path(folder: Path, tmp_path: Path) -> None:
    path = folder / "spec.toml"
    spec, _ = load_spec(path)
    assert check(spec).fits == check(path).fits
    assert inspect(spec, set=["moe.top_k=2"]).as_json() == inspect(path, set=["moe.top_k=2"]).as_json()
    assert export_config(spec).text == export_config(path).text
    build(spec, target="torch", output=tmp_path / "out")
    assert (tmp_path / "out/spec.toml").read_text() == (folder / "out/spec.toml").read_text()


def test_generate_returns_texts_or_yields_pieces(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = Recorded()
    model = load(folder / "out", folder / "weights", progress=shown)
    prompts: list[str | list[int]] = ["ab", [5, 6]]
    whole = model.generate(prompts, max_new_tokens=6)
    assert shown.phases[:2] == ["open", "load"]
    assert [len(ids) for ids in whole.token_ids] == [6, 6]
    assert all(isinstance(text, str) for text in whole.texts)
    stream = model.generate(prompts, max_new_tokens=6, stream=True)
    pieces = list(stream)
    for i in range(2):
        mine = [piece for piece in pieces if piece.sequence == i]
        assert [piece.token_id for piece in mine] == whole.token_ids[i]
        assert "".join(piece.text for piece in mine) == whole.texts[i]
    assert stream.result().token_ids == whole.token_ids
    assert model.generate([5, 6], max_new_tokens=6).token_ids == whole.token_ids[1:]
    begun = model.generate("ab", max_new_tokens=6, stream=True)
    next(begun)
    assert model.generate(prompts, max_new_tokens=6).token_ids == whole.token_ids  # which ends what was begun
    assert list(begun) == []
    assert begun.result().interrupted and begun.result().as_json()["ok"] is False
    assert capfd.readouterr() == ("", "")


QUANTIZE: dict[str, object] = {"weights": "w", "output": "o"}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (check, {"target": "jax"}, "--target: 'jax' is none of torch, onnx, trt"),
        (check, {"batch": 0}, "--batch: 0 is less than 1"),
        (check, {"sm": "80,,86"}, "--sm: '80,,86' is no SM version"),
        (check, {"target": "torch", "sm": 120}, "--sm has no effect: it needs --target trt"),
        (build, {"target": "torch", "stages": 1}, "--stages has no effect: it needs --target onnx or trt"),
        (build, {"target": "onnx", "entry": ["train"]}, "--entry: 'train' is none of prefill, decode"),
        (quantize, QUANTIZE | {"part": "3/2"}, "--part: '3/2' is not I/N"),
        (quantize, QUANTIZE | {"max_shard_size": 0}, "--max-shard-size: 0 is no size"),
        (quantize, QUANTIZE | {"auto": True, "effective_bits": float("nan")}, "nan is not a finite number"),
    ],
)
def test_wrong_arguments_raise(
    function: Callable[..., object], arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(N3CError) as caught:
        function(write_small(tmp_path), **arguments)
    assert caught.value.exit_code is ExitCode.USAGE
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["E0701"]
    assert message in str(caught.value)
