"""`n3c run` on a CPU: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from n3c.runtime.build_folder import open_build
from n3c.runtime.generation import runner as runner_module
from n3c.runtime.generation.runner import open_runner
from n3c.runtime.generation.sequence import Options
from support.checkpoints import write_checkpoint
from support.command import Result, default_signals, n3c
from support.specs import SMALL, spec_from_text

TEXT = (
    SMALL.replace('"MEM*E-ME"', '"M*E"')
    .replace("vocab_size = 97", "vocab_size = 256")
    .replace("max_seq_len = 32", "batch_sizes = [1, 3]\nmax_seq_len = 48\nprefill_chunk = 8\ndraft_tokens = 2")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level build `out` and a checkpoint `weights` of it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "spec.toml").write_text(TEXT.lstrip())
    write_checkpoint(folder / "weights", spec_from_text(TEXT), shards=1)
    (folder / "weights" / "tokenizer.json").unlink()
    assert n3c("build", folder / "spec.toml", "--target", "torch", "-o", folder / "out").code == 0
    return folder


@pytest.fixture
def run(folder: Path) -> Callable[..., Result]:
    def call(*arguments: object, weights: Path | None = None) -> Result:
        return n3c("run", folder / "out", "--weights", weights or folder / "weights", *arguments)

    return call


def test_the_fixed_keys_and_a_batch(run: Callable[..., Result]) -> None:
    alone = run("--prompt", "ab", "--max-new-tokens", 9, "--json")
    assert alone.code == 0
    data = alone.data
    assert len(data["token_ids"]) == 9 and isinstance(data["text"], str)
    assert data["tokens_per_second"] > 0
    assert 1 <= data["acceptance_length"] <= 3
    assert data["bytes"]["states"] > 0
    both = run(
        "--prompt", "ab", "--prompt", "a longer prompt", "--prompt-ids", "1, 2,3", "--max-new-tokens", 9, "--json"
    ).data
    assert [len(c["token_ids"]) for c in both["completions"]] == [9, 9, 9]
    assert both["completions"][0]["token_ids"] == both["token_ids"] == data["token_ids"]
    assert [c["prompt_tokens"] for c in both["completions"]] == [2, 15, 3]
    plain = run("--prompt", "ab", "--max-new-tokens", 9, "--no-mtp", "--json").data
    assert (plain["token_ids"], plain["acceptance_length"], plain["speculative"]) == (data["token_ids"], 1.0, False)


@pytest.mark.parametrize("engine", ["torch", "reference"])
def test_every_engine_gives_the_same_tokens(run: Callable[..., Result], engine: str) -> None:
    options = ("--prompt", "ab", "--prompt-ids", "1,2,3", "--max-new-tokens", 9, "--json")
    usual, other = run(*options).data, run(*options, "--engine", engine).data
    assert (usual["engine"], other["engine"]) == ("onnxruntime", engine)
    assert [c["token_ids"] for c in other["completions"]] == [c["token_ids"] for c in usual["completions"]]
    plain = run(*options, "--engine", engine, "--no-mtp").data
    assert [c["token_ids"] for c in plain["completions"]] == [c["token_ids"] for c in usual["completions"]]


@pytest.mark.parametrize(
    ("engine", "device", "instead"),
    [
        ("tensorrt", "cpu", "`--device cuda`, or another engine: onnxruntime, torch, reference"),
        ("onnxruntime", "cuda", "`--device cpu`, or another engine: tensorrt, torch"),
        ("reference", "cuda", "`--device cpu`, or another engine: tensorrt, torch"),
    ],
)
def test_an_engine_that_does_not_run_on_the_device(
    run: Callable[..., Result], engine: str, device: str, instead: str
) -> None:
    result = run("--prompt", "ab", "--engine", engine, "--device", device, "--json")
    assert (result.code, result.codes) == (2, ["E0707"])
    assert result.data["diagnostics"][0]["help"] == instead


def test_text_is_streamed_on_stdout_and_figures_on_stderr(run: Callable[..., Result], tmp_path: Path) -> None:
    data = run("--prompt", "ab", "--max-new-tokens", 6, "--json").data
    shown = run("--prompt", "ab", "--max-new-tokens", 6)
    assert shown.out == data["text"] + "\n"
    assert "6 new at" in shown.err and "tokens a round" in shown.err
    (tmp_path / "prompts.txt").write_text("ab\n\nsecond\n")
    several = run("--prompt-file", tmp_path / "prompts.txt", "--max-new-tokens", 6, "--no-mtp")
    assert several.out.startswith(f"[1] {data['text']}\n[2] ")


def test_sampling_by_seed(run: Callable[..., Result]) -> None:
    def ids(*options: object) -> Any:
        return run("--prompt", "ab", "--max-new-tokens", 8, "--json", "--temperature", 1, *options).data["token_ids"]

    assert ids("--seed", 1) == ids("--seed", 1) != ids("--seed", 2)
    assert ids("--top-k", 1) == run("--prompt", "ab", "--max-new-tokens", 8, "--json").data["token_ids"]
    assert ids("--top-p", 0.001) == ids("--top-k", 1)


def test_stops_by_id_by_text_and_by_the_checkpoint(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    whole = run("--prompt-ids", "5,6", "--max-new-tokens", 12, "--json").data["token_ids"]
    stop = whole[5]
    until = whole.index(stop) + 1
    by_id = run("--prompt-ids", "5,6", "--max-new-tokens", 12, "--stop-ids", stop, "--json").data
    assert (by_id["token_ids"], by_id["completions"][0]["finish_reason"]) == (whole[:until], "stop")
    weights = tmp_path / "weights"
    shutil.copytree(folder / "weights", weights)
    (weights / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 255]}))
    assert run("--prompt-ids", "5,6", "--json", weights=weights).data["token_ids"][until - 1] == stop
    on = run("--prompt-ids", "5,6", "--ignore-eos", "--max-new-tokens", 12, "--json", weights=weights).data
    assert on["token_ids"] == whole
    text = run("--prompt", "ab", "--max-new-tokens", 20, "--json").data["text"]
    cut = text[4:6]
    stopped = run("--prompt", "ab", "--max-new-tokens", 20, "--stop", cut, "--json").data
    assert stopped["text"] == text[: text.find(cut)]
    (weights / "generation_config.json").write_text("[]")
    assert run("--prompt", "ab", "--json", weights=weights).codes == ["E0810"]


def test_a_reasoning_budget_forces_the_end_tag(run: Callable[..., Result]) -> None:
    forced = run("--prompt", "x<think>", "--max-new-tokens", 14, "--reasoning-budget", 4, "--json").data["token_ids"]
    assert bytes(forced[4:12]) == b"</think>"
    by_ids = run(
        *("--prompt-ids", "1,2", "--max-new-tokens", 8, "--reasoning-budget", 2, "--json"),
        *("--thinking-tags", "1,2", "250,251"),
    ).data["token_ids"]
    assert by_ids[2:4] == [250, 251]


def test_prompts_that_do_not_fit(run: Callable[..., Result]) -> None:
    """The context length is 47 tokens: the caches hold 48, and a round writes two drafts behind the newest token."""
    assert run("--prompt", "a" * 47, "--json").data["token_ids"] == []
    assert len(run("--prompt", "a" * 46, "--json").data["token_ids"]) == 1
    too_long = run("--prompt", "a" * 48, "--prompt", "b", "--json")
    assert (too_long.code, too_long.codes) == (2, ["E0802"])
    assert "prompt 1 has 48 tokens" in too_long.data["diagnostics"][0]["message"]
    several = run(*["--prompt-ids", "1"] * 4, "--json")
    assert (several.code, several.codes) == (2, ["E0803"])
    assert run("--prompt-ids", "1,256", "--json").codes == ["E0804"]
    assert run("--prompt", "", "--json").codes == ["E0802"]
    assert run("--prompt-ids", "1;2", "--json").codes == ["E0701"]
    assert run("--json").codes == ["E0701"]


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--temperature", bad) for bad in ("nan", "inf", "-1", "x")),
        *(("--top-p", bad) for bad in ("nan", "0", "1.5", "-0.1", "inf")),
        *(
            (f"--{name}", bad)
            for name in ("top-k", "seed", "max-new-tokens")
            for bad in ("-1", str(2**63), "1" + "0" * 400, "1.5")
        ),
        ("--reasoning-budget", "-1"),
        ("--reasoning-budget", str(2**63)),
    ],
)
def test_numbers_out_of_their_range(arguments: tuple[str, str], run: Callable[..., Result]) -> None:
    result = run("--prompt", "a", *arguments, "--json")
    assert result.code == 2
    assert result.codes in (["E0701"], ["E0816"])
    name = arguments[0].removeprefix("--")
    message = result.data["diagnostics"][0]["message"]
    assert name in message or name.replace("-", "_") in message


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_prompts(text: str, run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    result = run("--prompt-file", tmp_path / "prompts.txt", "--json")
    assert (result.code, result.codes) == (2, ["E0802"])
    assert result.data["diagnostics"][0]["file"].endswith("prompts.txt")


def test_weights_that_do_not_fit(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    assert n3c("run", folder / "out", "--prompt", "a", "--json").codes == ["E0808"]
    assert run("--prompt", "a", "--json", weights=tmp_path / "nothing").codes == ["E0601"]

    def changed(name: str, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> list[str]:
        weights = tmp_path / name
        shutil.copytree(folder / "weights", weights)
        tensors = load_file(weights / "model.safetensors")
        config = json.loads((weights / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, weights / "model.safetensors")
        (weights / "config.json").write_text(json.dumps(config))
        result = run("--prompt", "a", "--json", weights=weights)
        assert result.code == 6
        return result.codes

    norm = "backbone.norm_f.weight"
    assert changed("missing", lambda t, _: t.update(other=t.pop(norm))) == ["E0603", "E0608"]
    assert changed("shape", lambda t, _: t.update({norm: t[norm][:-1].clone()})) == ["E0606"]
    quantized = {"backbone.layers.0.mixer.out_proj.weight": torch.zeros(64, 128, dtype=torch.float8_e4m3fn)}
    assert changed("format", lambda t, _: t.update(quantized)) == ["E0619"]
    assert changed("routing", lambda _, c: c.update(num_experts_per_tok=2, routed_scaling_factor=1.0)) == ["E0809"] * 2


def test_weights_that_are_not_finite_are_noticed(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "weights", tmp_path / "weights")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    tensors["backbone.norm_f.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "weights" / "model.safetensors")
    result = run("--prompt", "a", "--json", weights=tmp_path / "weights")
    assert (result.code, result.codes) == (5, ["E0806"])


def test_no_tokenizer_and_no_plans(folder: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    text = TEXT.replace("vocab_size = 256", "vocab_size = 97").lstrip()
    spec.write_text(text)
    assert n3c("build", spec, "--target", "torch", "-o", tmp_path / "out").code == 0
    write_checkpoint(tmp_path / "weights", spec_from_text(text), shards=1)
    tokenizer = tmp_path / "weights" / "tokenizer.json"
    where = (tmp_path / "out", "--weights", tmp_path / "weights")
    assert n3c("run", *where, "--prompt-ids", "1", "--json").codes == ["E0805"]  # the `{}` of the fixture
    tokenizer.unlink()
    result = n3c("run", *where, "--prompt", "a", "--json")
    assert (result.code, result.codes) == (6, ["E0805"])
    ids = n3c("run", *where, "--prompt-ids", "1,2", "--max-new-tokens", 3)
    assert ids.code == 0 and len(ids.out.split()) == 3
    missing = n3c("run", *where, "--prompt-ids", "1", "--device", "cuda", "--engine", "tensorrt", "--json")
    assert (missing.code, missing.codes) == (4, ["E0813"])
    assert n3c("run", *where, "--prompt-ids", "1", "--reasoning-budget", 1, "--json").codes == ["E0805"]
    assert n3c("run", *where, "--prompt-file", tmp_path / "none", "--json").codes == ["E0601"]


@pytest.mark.parametrize(
    ("sequences", "continuous", "sizes"), [(1, False, [1]), (1, True, [1]), (2, False, [3]), (3, True, [1, 3])]
)
def test_the_sizes_of_a_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sequences: int, continuous: bool, sizes: list[int]
) -> None:
    """The smallest of the build's that holds the sequences; where these come and go, each that is smaller, once."""
    given: list[list[int]] = []

    def opened(_: object, __: object, ___: object, batch_sizes: list[int], *____: object) -> None:
        given.append(batch_sizes)

    monkeypatch.setattr(runner_module, "open_engine", opened)
    open_runner(open_build(folder / "out"), folder / "weights", sequences=sequences, continuous=continuous)
    assert given == [sizes]


def test_other_weights_between_requests(folder: Path, tmp_path: Path) -> None:
    """As reinforcement learning does; weights that do not fit leave the old ones in place."""
    write_checkpoint(tmp_path / "other", spec_from_text(TEXT), shards=2, tensors=None)
    tensors = load_file(folder / "weights" / "model.safetensors")
    shutil.rmtree(tmp_path / "other")
    changed = {name: t.flip(0) if name.startswith("backbone.embeddings") else t for name, t in tensors.items()}
    write_checkpoint(tmp_path / "other", spec_from_text(TEXT), shards=2, tensors=changed)
    runner = open_runner(open_build(folder / "out"), folder / "weights")

    def tokens() -> list[int]:
        generation = runner.generation([[1, 2, 3]], Options(max_new_tokens=6))
        generation.run()
        return generation.sequences[0].new

    first = tokens()
    runner.replace_weights(tmp_path / "other")
    second = tokens()
    assert second != first
    with pytest.raises(Exception, match="E0601"):
        runner.replace_weights(tmp_path / "nowhere")
    assert tokens() == second
    runner.replace_weights(folder / "weights")
    assert tokens() == first


def test_ctrl_c_prints_what_there_is(folder: Path) -> None:
    """The context is short, so a slow terminal is played: the program is stopped after its first token."""
    script = (
        "import signal, os, n3c.compiler.cli.generation as r\n"
        "def show(self, piece):\n"
        "    r.say(f'{piece.token_id} ', newline=False); os.kill(os.getpid(), signal.SIGINT)\n"
        "r.Printer.show = show\n"
        "from n3c.compiler.cli.main import main; main()"
    )
    arguments = ["run", folder / "out", "--weights", folder / "weights", "--prompt", "ab", "--max-new-tokens", 20]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=default_signals,
    )
    assert done.returncode == 1
    assert len(done.stdout.split()) == 1
    assert "E0702" in done.stderr and "Traceback" not in done.stderr
