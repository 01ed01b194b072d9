"""What train.py says to bad input, and how it reads data: run in this process."""

from __future__ import annotations

import ast
import bz2
import errno
import gzip
import importlib.metadata
import io
import json
import os
import re
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from n3c.backends.torch.emit import emit
from n3c.specs.schema import Rule, Training

from .generated import KEPT_FLOAT32, SHA256, imported, tiny_spec, write_generated

TEXT = b"a small text, again and again; " * 40


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import the generated training program."""
    spec = tiny_spec("ME*", mtp=None)
    folder = tmp_path_factory.mktemp("train")
    write_generated(replace(spec, model=replace(spec.model, vocab_size=256)), folder)
    with imported(folder) as modules:
        yield modules


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "2", "--seq-len", "16"]
    return [*given, "--save-every", "1", "--val-every", "0", *more]


def opened(train: Any, data: Path) -> Any:
    """Return the tokens of --data, with default settings."""
    settings = train.settings.parse_settings("", arguments(data, data / "out"))
    return train.sources.open_tokens(data, settings)


def npy(array: Any) -> bytes:
    """Return the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def failure(train: Any, capsys: pytest.CaptureFixture[str], code: int, *given: str) -> str:
    """Run the command line, which must fail with `code`, and return its one line of error."""
    capsys.readouterr()
    assert train.train.main(given) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "cannot be read: No such file or directory"),
        ("empty", b"", "holds no tokens"),
        ("short", b"abc", "holds 3 tokens, and one sequence has 16"),
        ("odd.bin", b"abc", "is no file of torch.uint16: 3 bytes"),
        ("wrong.npy", b"\x93NUMPY\x01\x00\x05\x00{'a':", "is no .npy file"),
        ("float.npy", np.zeros(99), "is no .npy file"),
        ("cube.npy", np.zeros((9, 9, 9), np.uint16), "is no .npy file"),
        ("columns.npy", np.zeros((9, 8), np.uint16, "F"), "is no .npy file"),
        ("beyond.npy", np.array([1, 2, 3] * 20 + [256] + [1] * 9), "holds token 256, and the vocabulary has 256"),
        ("cut.npy", npy(np.arange(99, dtype=np.uint16))[:-50], "is not as long as the 99 tokens of its header"),
        ("negative.npy", np.array([1] * 20 + [-1]), "holds token -1"),
        ("long.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99, "is no .npy file"),
        ("deep.npy", b"\x93NUMPY\x01\x00\x0f\x27" + b"-" * 9999, "is no .npy file"),
        ("shape.npy", b"\x93NUMPY\x01\x00\x23\x00{'descr': '<u2', 'shape': (True,)}  ", "is no .npy file"),
        ("packed.txt", gzip.compress(TEXT, mtime=0), "is a gzip archive"),
        ("packed.dat", bz2.compress(TEXT), "is a bzip2 archive"),
        ("beyond.bin", np.array([7] * 20 + [999], np.uint16).tobytes(), "(the first wrong one is token 20)"),
    ],
)
def test_bad_data(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    said = failure(train, capsys, 6, *arguments(path, tmp_path / "out"))
    assert message in said and name in said


@pytest.mark.parametrize("name", ["zero", "pipe", "link", "pipe.bin", "pipe.npy"])
def test_what_may_never_end_is_refused(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = Path("/dev/zero") if name == "zero" else tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name == "link":
        path.symlink_to("/dev/zero")
    assert f"{path} is not a regular file" in failure(train, capsys, 6, *arguments(path, tmp_path / "out"))


def test_loops_of_links(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "above").symlink_to(tmp_path, target_is_directory=True)
    said = failure(train, capsys, 6, *arguments(tmp_path / "loop", tmp_path / "out"))
    assert "cannot be read: Too many levels of symbolic links" in said
    (tmp_path / "text").write_bytes(TEXT)
    assert opened(train, tmp_path).count == len(TEXT)


def test_a_sparse_giant_is_refused(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "giant.bin").open("wb") as file:
        file.truncate(1 << 43)
    said = failure(train, capsys, 6, *arguments(tmp_path / "giant.bin", tmp_path / "out"))
    assert "cannot be mapped into memory" in said or "take a longer --seq-len" in said


def test_more_windows_than_an_order_in_memory_has(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.data, "MOST_WINDOWS", 3)
    said = failure(train, capsys, 6, *arguments(text, tmp_path / "out"))
    assert "sequences of 16 tokens, more than 3: take a longer --seq-len" in said


def test_texts_of_any_size(train: Any, tmp_path: Path) -> None:
    """Large ones are mapped, small ones read, empty ones nothing; a window goes across them."""
    texts = [b"small", bytes(range(256)) * 4096 + b"!", b"", TEXT, bytes(1 << 20)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text)
    tokens, whole = opened(train, tmp_path), b"".join(texts)
    assert tokens.count == len(whole) and tokens.bytes_are_tokens
    for start in (0, 3, len(texts[1]) - 2, len(texts[1]) + 3, len(whole) - 4000):
        assert bytes(tokens.read(start, 4000).tolist()) == whole[start : start + 4000]


def test_more_files_than_may_be_open(train: Any, tmp_path: Path) -> None:
    for number in range(300):
        np.full(5, number % 256, "<u2").tofile(tmp_path / f"{number:03}.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        tokens = opened(train, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tokens.read(4, 7).tolist() == [0, 1, 1, 1, 1, 1, 2]


def test_empty_folder(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".hidden").write_bytes(TEXT)
    assert "holds no tokens" in failure(train, capsys, 6, *arguments(tmp_path / "data", tmp_path / "out"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch-size", "3", "--accumulation", "2"], "--batch-size 3 does not divide into 1 processes x 2 parts"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--lr", "nan"], "lr = nan is not a number"),
        (["--seq-len", "9999999"], "--seq-len 9999999 is not from 2 to"),
        (["--settings", "none.toml"], "none.toml cannot be read"),
        (["--export-dtype", "float16"], "--export-dtype float16 is none of float32, bfloat16"),
        (["--activation-checkpointing", "moe,mtp"], "mtp is none of all, none, mamba2, moe, attention"),
        (["--numerics", "fp64"], "--numerics fp64 is none of float32, bf16"),
        (["--settings", "/dev/zero"], "larger than 65536 bytes"),
        (["--seed", "-1"], "--seed -1 is not from 0"),
        (["--seed", str(1 << 63)], "is not from 0 to 9223372036854775807"),
        (["--batch-size", str(1 << 40)], "--batch-size 1099511627776 is more than 1048576"),
        (["--warmup", "0.9"], "--warmup and --decay must fit into --steps"),
        (["--warmup", "3"], "--warmup and --decay must fit into --steps"),
        (["--schedule", "step"], "--schedule step is none of wsd, cosine, linear"),
        (["--optimizer", "muon", "--numerics", "bf16-split"], "--optimizer muon cannot be combined with"),
        (["--train", "mtp.*"], "--train mtp.*: no weight has such a role; there are attention.k_proj"),
        (["--freeze", "moe.gate"], "--freeze moe.gate: no weight has such a role"),
        (["--freeze", "*"], "--train and --freeze leave nothing to train"),
        (["--ema", "1"], "--ema must be less than 1"),
        (["--document-separator", "256"], "--document-separator 256 is not from -1 to 255"),
        (
            ["--compile", "--activation-checkpointing", "--tensor-parallel", "2"],
            "--compile cannot be combined with --activation-checkpointing, --tensor-parallel",
        ),
        (["--expert-parallel", "0"], "--expert-parallel must be at least 1"),
        (["--expert-parallel", "2"], "--expert-parallel 2: start it with torchrun"),
    ],
)
def test_bad_usage(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert message in failure(train, capsys, 2, *arguments(text, tmp_path / "out", *given))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_compiled_blocks(train: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three is compiled, once for both steps, and the run is the same."""
    compiled: list[Any] = []
    compile_ = torch.compile

    def note(function: Any) -> Any:
        compiled.append(function)
        return compile_(function)

    monkeypatch.setattr(torch, "compile", note)
    for option in ("--no-compile", "--compile"):
        given = arguments(text, tmp_path / option, "--steps", "3", option)
        assert train.train.main(given) == 0 and len(compiled) == (3 if option == "--compile" else 0)
    eager, ours = (
        [json.loads(line) for line in (tmp_path / option / "metrics.jsonl").read_text().splitlines()]
        for option in ("--no-compile", "--compile")
    )
    assert len(ours) == 3
    for name in ("loss", "balance_loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in eager], abs=1e-4)


def test_settings_file(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f'data = "{text}"\nout = "o"\nsteps = 9\nlr = 1\nnumerics = "bf16"\n')
    settings = train.settings.parse_settings("", ["--settings", str(path), "--steps", "5", "--numerics", "float32"])
    assert (settings.steps, settings.lr, settings.numerics, settings.data) == (5, 1.0, "float32", str(text))
    path.write_text('step = 1\nlr = "fast"\nsteps = 3\ndata = "d"\nout = "o"\n')
    said = failure(train, capsys, 2, "--settings", str(path))
    assert said == "step is no setting; lr = 'fast' is no float"


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ([], "none"),
        (["--activation-checkpointing"], "all"),
        (["--no-activation-checkpointing"], "none"),
        (["--activation-checkpointing", "moe,mamba2"], "moe,mamba2"),
        ([True], "all"),
        ([False], "none"),
    ],
)
def test_blocks_that_are_computed_twice(train: Any, text: Path, tmp_path: Path, given: list[Any], kinds: str) -> None:
    """As options, and as booleans of a settings file."""
    if given and isinstance(given[0], bool):
        path = tmp_path / "settings.toml"
        path.write_text(f"activation_checkpointing = {str(given[0]).lower()}\n", "utf-8")
        given = ["--settings", str(path)]
    settings = train.settings.parse_settings("", arguments(text, tmp_path / "out", *given))
    assert settings.activation_checkpointing == kinds


def test_an_earlier_run_is_not_mixed_in(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(text, tmp_path / "out", "--keep", "1")
    assert train.train.main(given) == 0
    assert "add --resume, or choose another --out" in failure(train, capsys, 6, *given)
    assert "lr 0.001, now 0.5" in failure(train, capsys, 6, *given, "--resume", "--lr", "0.5")
    assert "the checkpoint has done 2 steps" in failure(train, capsys, 2, *given, "--resume", "--steps", "1")
    about = tmp_path / "out" / "checkpoints" / "step-000000002" / "train.json"
    about.write_text(about.read_text().replace('"mamba_num_heads": 8', '"mamba_num_heads": 16'))
    assert "is of another spec: mamba_num_heads 16, now 8" in failure(train, capsys, 6, *given, "--resume")
    (about.parent / "__0_0.distcp").write_bytes(b"torn")
    about.write_text(about.read_text().replace('"mamba_num_heads": 16', '"mamba_num_heads": 8'))
    assert "cannot be read" in failure(train, capsys, 6, *given, "--resume")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "[" * 100_000, "nests too deeply"),
        ('"config": {', '"config": [], "left": {', "train.json is not what train.py writes"),
        ('"step": 2', '"step": "2"', "train.json has no step"),
        ('"step": 2', '"step": -2', "train.json has no step"),
        ('"step": 2', '"stop": 2', "train.json has no step"),
        ('"step": 2', '"step": ', "Expecting value"),
    ],
)
def test_a_checkpoint_that_is_damaged(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    given = arguments(text, tmp_path / "out", "--keep", "1")
    assert train.train.main(given) == 0
    about = tmp_path / "out" / "checkpoints" / "step-000000002" / "train.json"
    about.write_text(about.read_text().replace(old, new, 1))
    shown = failure(train, capsys, 6, *given, "--resume")
    assert "cannot be read" in shown and message in shown


def test_resume_keeps_the_data(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings of validation may change, but not what they leave to train on; a seed may be large."""
    given = arguments(text, tmp_path / "out", "--val-every", "1", "--seed", str(2**32 - 1))
    assert train.train.main(given) == 0
    more = [*given, "--resume", "--steps", "3"]
    for change in (["--val-every", "0"], ["--val-fraction", "0.2"], ["--val-data", str(text)]):
        assert "is of other data: train_tokens 1192, now " in failure(train, capsys, 6, *more, *change)
    assert train.train.main([*more, "--val-every", "3", "--val-sequences", "1"]) == 0


def test_resume_keeps_the_rules_of_training(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that was built again with other formats goes on with no run of the first; float32 has none."""
    base = tiny_spec("M*", mtp=None)
    base = replace(base, model=replace(base.model, vocab_size=256))
    rules = (Rule("bf16", roles=("attention.*", "mamba.in_proj")),)
    nvfp4 = arguments(text, tmp_path / "low", "--numerics", "nvfp4")
    float32 = arguments(text, tmp_path / "plain")
    first, second = Training("nvfp4", rules=rules), Training("mxfp8", (1, 16), rules)
    for training, message in ((first, ""), (second, "is of other rules of [training]: "), (first, "")):
        folder = tmp_path / f"{training.format}"
        folder.mkdir(exist_ok=True)
        write_generated(replace(base, training=training), folder)
        with imported(folder) as program:
            assert program.train.main([*float32, "--resume"]) == 0
            if not message:
                assert program.train.main([*nvfp4, "--resume"]) == 0
                continue
            said = failure(program, capsys, 6, *nvfp4, "--resume")
            assert message in said and "backbone.layers.0.mixer.out_proj nvfp4, now mxfp8" in said
            assert "disable_2d_quantization False, now True" in said


def test_bfloat16_gradients_are_summed_in_float32(train: Any, text: Path, tmp_path: Path) -> None:
    """Also those of a weight with several uses, as the head has one for each step of prediction."""
    settings = train.settings.parse_settings("", arguments(text, tmp_path, "--numerics", "bf16"))
    trainer = train.train.Trainer(settings, train.world.World(0, 1, torch.device("cpu")))
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)
    with trainer.autocast():
        y = sum((x * scale) @ weight for scale in (1.0, 0.3, 0.1))
    assert isinstance(y, torch.Tensor)
    y.square().sum().backward()
    assert weight.grad is not None and not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("when", ["--async-checkpoints", "--no-async-checkpoints"])
def test_full_disk(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], when: str) -> None:
    """A checkpoint that does not fit leaves the one before it, and the run can go on from that."""
    out = tmp_path / "out"
    assert train.train.main(arguments(text, out)) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = failure(train, capsys, 6, *arguments(text, out, "--resume", "--steps", "4", when))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000000003 cannot be written: " in said and "File too large" in said
    assert said.endswith(f"the last good checkpoint is {out}/checkpoints/step-000000002")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000000001", "step-000000002"]
    assert train.train.main(arguments(text, out, "--resume", "--steps", "4")) == 0


def test_a_loss_that_is_not_finite(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops, says which module's output was the first, and keeps the checkpoint."""
    out, bad = tmp_path / "out", tmp_path / "bad"
    assert train.train.main(arguments(text, out)) == 0
    model = train.model.Model()
    broken = model.backbone.layers[1].mixer.shared_experts.up_proj.weight
    for value, where in (
        (torch.inf, "the weight {}.weight was not finite before the step"),
        (1e38, "the output of {} is the first that is not finite"),
    ):
        with torch.no_grad():
            broken.fill_(value)
        train.checkpoint.save_checkpoint(model, bad)
        said = failure(train, capsys, 5, *arguments(text, tmp_path / f"other{value}", "--weights", str(bad)))
        assert said.startswith("step 1: loss ") and said.endswith("there is no checkpoint yet")
        assert where.format("backbone.layers.1.mixer.shared_experts.up_proj") in said

    def overflow(optimizer: torch.optim.Optimizer, closure: None = None) -> None:
        first = optimizer.param_groups[0]["params"][0]
        if first.grad.any():  # DCP makes a step without gradients
            first.data.fill_(torch.inf)

    # Weights that are not finite are never saved.
    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    said = failure(train, capsys, 5, *arguments(text, out, "--resume", "--steps", "9"))
    assert said.startswith("step 3 made weights that are not finite")
    assert said.endswith(f"the last good checkpoint is {out}/checkpoints/step-000000002")


def test_reads_every_form_alike(train: Any, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 1000)
    for kind in (np.uint8, np.uint16, np.uint32, np.int32, np.int64):
        np.save(tmp_path / f"{kind.__name__}.npy", ids.astype(kind))
    (tmp_path / "raw.bin").write_bytes(ids.astype("<u2").tobytes())
    (tmp_path / "bytes").write_bytes(bytes(ids.tolist()))
    (tmp_path / "parts" / "b").mkdir(parents=True)
    np.save(tmp_path / "parts" / "a.npy", ids[:300])
    (tmp_path / "parts" / "b" / "c.bin").write_bytes(ids[300:].astype("<u2").tobytes())
    (tmp_path / "parts" / "readme").write_text("not tokens")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1").write_bytes(bytes(ids[:301].tolist()))
    (tmp_path / "texts" / "2").write_bytes(bytes(ids[301:].tolist()))
    for path in tmp_path.iterdir():
        tokens = opened(train, path)
        assert tokens.count == 1000
        for start, length in ((0, 1000), (299, 2), (300, 1), (990, 10)):
            assert tokens.read(start, length).tolist() == ids[start : start + length].tolist(), path


def test_epochs_are_shuffled_windows(train: Any, tmp_path: Path) -> None:
    """Each epoch reads every window once, in an order of its own that depends on the seed alone."""
    np.save(tmp_path / "ids.npy", np.arange(64))
    tokens = opened(train, tmp_path / "ids.npy")
    windows = train.data.Windows(tokens, 0, 64, 8, seed=3)
    epochs = [[windows.shuffled(e * 8 + n).ids.tolist() for n in range(8)] for e in range(2)]
    for epoch in epochs:
        assert sorted(x for window in epoch for x in window) == list(range(64))
    assert epochs[0] != epochs[1]
    other = train.data.Windows(tokens, 0, 64, 8, seed=4)
    assert [other.shuffled(n).ids.tolist() for n in range(8)] != epochs[0]


def test_groups_of_the_optimizer(train: Any) -> None:
    """Norms, biases, SSM vectors and embeddings do not decay; every parameter is in one group."""
    model = train.model.Model()
    settings = train.settings.parse_settings("", ["--data", "d", "--out", "o", "--steps", "1"])
    groups = train.optimizer.build_optimizer(model, settings).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)].rpartition("layers.")[2] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(decayed) + len(others) == len(names)
    assert {"0.mixer.in_proj.weight", "1.mixer.gate.weight", "1.mixer.experts.up_proj", "lm_head.weight"} <= decayed
    vectors = ("A_log", "D", "dt_bias", "conv1d.bias", "norm.weight")
    assert {f"0.mixer.{name}" for name in vectors} | {"backbone.embeddings.weight", "0.norm.weight"} <= others


def test_documents(train: Any) -> None:
    """A separator is the last token of its document."""
    ids = torch.tensor([[7, 3, 3, 5, 3], [3, 1, 1, 1, 1]])
    assert train.data.documents_of(ids, -1) is None
    assert train.data.documents_of(ids, 3).tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, 1, 1]]


def test_document_separator(train: Any, text: Path, tmp_path: Path) -> None:
    """The first loss, and validation, are those of the fresh model with documents."""
    run = arguments(text, tmp_path / "out", "--document-separator", str(ord(" ")), "--val-every", "1", "--steps", "1")
    assert train.train.main(run) == 0
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    settings = train.settings.parse_settings("", run)
    model = train.weights.build_model(settings, train.world.World(0, 1, torch.device("cpu")), None)
    windows, held_out = train.data.open_data(settings)
    ids = torch.stack([windows.shuffled(n).ids for n in range(2)])
    documents = train.data.documents_of(ids, ord(" "))
    assert documents.max() > 0
    assert line["loss"] == pytest.approx(model(ids, ids, documents).loss.item(), abs=1e-6)
    assert line["loss"] != pytest.approx(model(ids, ids).loss.item(), abs=1e-4)
    train.checkpoint.load_checkpoint(model, tmp_path / "out" / "export")
    rows = torch.stack([held_out.read(n).ids for n in range(held_out.per_epoch)])
    documents = train.data.documents_of(rows, ord(" "))
    losses = -model(rows, None, documents).logits.log_softmax(-1)[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
    assert line["val_loss"] == pytest.approx(losses[documents[:, 1:] == documents[:, :-1]].mean().item(), abs=1e-5)


def test_export_in_bfloat16(train: Any, text: Path, tmp_path: Path) -> None:
    """It may change when a run goes on; what stays float32 in a cast does so in it."""
    run = arguments(text, tmp_path / "out", "--steps", "1")
    assert train.train.main(run) == 0
    path = tmp_path / "out" / "export" / "model.safetensors"
    exact = load_file(path)
    assert train.train.main([*run, "--resume", "--export-dtype", "bfloat16"]) == 0
    for name, tensor in load_file(path).items():
        kind = torch.float32 if name.endswith(KEPT_FLOAT32) else torch.bfloat16
        assert tensor.dtype == kind and torch.equal(tensor, exact[name].to(kind))


def test_weights_depend_on_the_seed_and_the_name_alone(train: Any) -> None:
    def weights(seed: str) -> dict[str, torch.Tensor]:
        torch.rand(7)  # what was drawn before does not matter
        given = ["--data", "d", "--out", "o", "--steps", "1", "--seed", seed]
        world = train.world.World(0, 1, torch.device("cpu"))
        model: torch.nn.Module = train.weights.build_model(train.settings.parse_settings("", given), world, None)
        return model.state_dict()

    first, again, other = weights("1"), weights("1"), weights("2")
    assert first.keys() == train.model.Model().state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert first[name].std() == pytest.approx(0.1, rel=0.05)  # initializer_range
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["lm_head.weight"], first["backbone.embeddings.weight"])


def test_weights_of_a_checkpoint(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Block by block, they are what `load_checkpoint` reads."""
    whole = train.model.Model()
    whole.routers()[0].e_score_correction_bias.uniform_()
    train.checkpoint.save_checkpoint(whole, tmp_path / "released")
    given = ["--data", "d", "--out", "o", "--steps", "1", "--weights", str(tmp_path / "released")]
    world = train.world.World(0, 1, torch.device("cpu"))
    model = train.weights.build_model(train.settings.parse_settings("", given), world, None)
    expected = whole.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    (tmp_path / "released" / "model.safetensors").unlink()
    said = failure(train, capsys, 6, *arguments(text, tmp_path / "out", "--weights", str(tmp_path / "released")))
    assert "has neither model.safetensors nor" in said


class Written(Future[None]):
    """A checkpoint that is on the disk when one waits for it."""

    def __init__(self, path: Path, log: list[str]) -> None:
        super().__init__()
        self.path, self.log = path, log
        log.append(f"begin {path.name}")

    def result(self, timeout: float | None = None) -> None:
        self.path.mkdir()
        self.log.append(f"end {self.path.name}")


def test_one_checkpoint_at_a_time(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving again waits for the one before; until `finish` nothing has the name of a checkpoint."""
    log: list[str] = []

    def begin(_: object, checkpoint_id: Path, **__: object) -> Written:
        return Written(checkpoint_id, log)

    monkeypatch.setattr(train.checkpointing, "async_save", begin)
    settings = train.settings.parse_settings("", ["--data", "d", "--out", "o", "--steps", "1"])
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    world = train.world.World(0, 1, torch.device("cpu"))
    store = train.checkpointing.Checkpoints(tmp_path / "store", 2, world, {}, {})
    for step in (1, 2):
        store.save(model, optimizer, settings, step)
        assert [path.name for path in store.all()] == [f"step-{n:09d}" for n in range(1, step)]
        assert not store.ready()
    assert log == [f"{what} .step-{n:09d}" for what, n in (("begin", 1), ("end", 1), ("begin", 2))]
    # A process that starts now, as after a kill, finds the first checkpoint only.
    found = train.checkpointing.Checkpoints(tmp_path / "store", 2, world, {}, {}).all()
    assert [path.name for path in found] == ["step-000000001"]
    store.finish()
    assert len(store.all()) == 2


def test_no_space_left(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of the distributed checkpoint itself meets a full disk, in the background."""
    out = tmp_path / "out"
    assert train.train.main(arguments(text, out)) == 0

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = failure(train, capsys, 6, *arguments(text, out, "--resume", "--steps", "4"))
    assert "step-000000003 cannot be written: [Errno 28] No space left on device" in said
    assert said.endswith(f"the last good checkpoint is {out}/checkpoints/step-000000002")
    assert len(list((out / "checkpoints").iterdir())) == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False])
def test_terminal(train: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rich: bool) -> None:
    """A progress line by rich where it is installed; else plain lines, as in a file."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert train.train.main(arguments(text, tmp_path / "out", "--peak-tflops", "0.001")) == 0
    shown = terminal.getvalue()
    assert ("2/2" in shown) == rich and ("2 of 2" in shown) == (not rich)
    assert all(name in shown for name in ("loss", "expert load", "tokens/s", "MFU"))
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["mfu"] == pytest.approx(line["flops_per_second"] / 1e9, abs=1e-4)


def test_tensorboard(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of a step under its name; an error where TensorBoard is asked for and not installed."""
    found: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "out" / "tensorboard"), 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            found.append((name, value, step))

        def close(self) -> None:
            found.append(("closed", 0.0, 0))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert train.train.main(arguments(text, tmp_path / "out", "--tensorboard")) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {(name, line["step"]) for line in lines for name in ("loss", "lr", "tokens_per_second")} <= {
        (name, step) for name, _, step in found
    }
    assert found[-1][0] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = failure(train, capsys, 2, *arguments(text, tmp_path / "other", "--tensorboard"))
    assert said.startswith("--tensorboard needs the package tensorboard")


def test_needs_torch_and_safetensors_only() -> None:
    """And what torch itself needs, at once; rich, TensorBoard and what reads data when they are used."""
    files = emit(replace(tiny_spec(), training=Training("nvfp4")), SHA256)
    roots = set[str]()
    for name in (
        "train.py",
        *(
            name
            for name in files
            if name.startswith("tiny_test/") and not re.search("modeling|callbacks|kernels", name)
        ),
    ):
        for node in ast.parse(files[name]).body:
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add((node.module or "").partition(".")[0])
    assert roots - sys.stdlib_module_names == {"tiny_test", "torch", "safetensors", "filelock", "jinja2"}
    needed = " ".join(importlib.metadata.requires("torch") or [])
    assert "filelock" in needed and "jinja2" in needed


class Mesh:
    """As much of a DeviceMesh as its size."""

    def __init__(self, size: int) -> None:
        self.count = size

    def __getitem__(self, _: str) -> Mesh:
        return self

    def size(self) -> int:
        return self.count


def test_sizes_that_do_not_divide(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once; 8 experts, 4 heads, 2 key-value heads, 8 Mamba-2 heads in 2 groups, widths 48 and 80."""
    require, meshes = train.parallelize.require_divisible, train.parallelize.Meshes
    with pytest.raises(ValueError, match="8") as error:
        require(train.model.Config(), meshes(Mesh(3), Mesh(3), Mesh(3), Mesh(3)))
    assert str(error.value).split("; ") == [
        "attention_num_heads 4 does not divide by 3 tensor-parallel processes",
        "mamba_num_heads 8 does not divide by 3 tensor-parallel processes",
        "mamba_n_groups 2 does not divide by 3 tensor-parallel processes",
        "moe_shared_intermediate_size 80 does not divide by 3 tensor-parallel processes",
        "attention_num_kv_heads 2 neither divides by nor into 3 tensor-parallel processes",
        "moe_num_experts 8 does not divide by 3 expert-parallel processes",
    ]
    require(train.model.Config(), meshes(Mesh(2), Mesh(2), Mesh(2), Mesh(2)))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 6)
    with pytest.raises(ValueError, match="6 processes do not divide into 2 expert-parallel x 2 tensor-parallel"):
        meshes.over_all("cpu", expert=2, tensor=2)
