"""What train.py says to bad input, and how it reads data: run in this process."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from n3c.backends.torch.emit import emit
from support.modules import import_file

from .generated import SHA256, tiny_spec

TEXT = b"a small text, again and again; " * 40


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Import a generated train.py with its model.py."""
    folder = tmp_path_factory.mktemp("train")
    spec = tiny_spec("ME*", mtp=None)
    for name, text in emit(replace(spec, model=replace(spec.model, vocab_size=256)), SHA256).items():
        (folder / name).write_text(text)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "model", import_file(folder / "model.py"))
        yield import_file(folder / "train.py")
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(data), "--out", str(out), "--steps", "2", "--batch-size", "2", "--seq-len", "16"]
    return [*given, "--save-every", "1", "--val-every", "0", *more]


def failure(train: Any, capsys: pytest.CaptureFixture[str], code: int, *given: str) -> str:
    """Run the command line, which must fail with `code`, and return its one line of error."""
    capsys.readouterr()
    assert train.main(given) == code
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
        ("wrong.npy", b"\x93NUMPY\x01\x00\x05\x00{'a':", "is no one-dimensional .npy file"),
        ("float.npy", np.zeros(99), "is no one-dimensional .npy file"),
        ("square.npy", np.zeros((9, 9), np.uint16), "is no one-dimensional .npy file"),
        ("beyond.npy", np.array([1, 2, 3] * 20 + [256] + [1] * 9), "holds token 256, and the vocabulary has 256"),
        ("negative.npy", np.array([1] * 20 + [-1]), "holds token -1"),
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
        (["--numerics", "fp64"], "--numerics fp64 is none of float32, bf16"),
        (["--warmup", "0.9"], "--warmup and --decay together"),
    ],
)
def test_bad_usage(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert message in failure(train, capsys, 2, *arguments(text, tmp_path / "out", *given))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_settings_file(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f'data = "{text}"\nout = "o"\nsteps = 9\nlr = 1\nnumerics = "bf16"\n')
    settings = train.parse_settings(["--settings", str(path), "--steps", "5", "--numerics", "float32"])
    assert (settings.steps, settings.lr, settings.numerics, settings.data) == (5, 1.0, "float32", str(text))
    path.write_text('step = 1\nlr = "fast"\nsteps = 3\ndata = "d"\nout = "o"\n')
    said = failure(train, capsys, 2, "--settings", str(path))
    assert said == "step is no setting; lr = 'fast' is no float"


def test_an_earlier_run_is_not_mixed_in(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(text, tmp_path / "out")
    assert train.main(given) == 0
    assert "add --resume, or choose another --out" in failure(train, capsys, 6, *given)
    assert "lr 0.001, now 0.5" in failure(train, capsys, 6, *given, "--resume", "--lr", "0.5")
    assert "the checkpoint has done 2 steps" in failure(train, capsys, 2, *given, "--resume", "--steps", "1")
    about = tmp_path / "out" / "checkpoints" / "step-000000002" / "train.json"
    about.write_text(about.read_text().replace('"mamba_num_heads": 8', '"mamba_num_heads": 16'))
    assert "is of another spec: mamba_num_heads 16, now 8" in failure(train, capsys, 6, *given, "--resume")
    (about.parent / "__0_0.distcp").write_bytes(b"torn")
    about.write_text(about.read_text().replace('"mamba_num_heads": 16', '"mamba_num_heads": 8'))
    assert "cannot be read" in failure(train, capsys, 6, *given, "--resume")


def test_full_disk(train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that does not fit leaves the one before it, and the run can go on from that."""
    out = tmp_path / "out"
    assert train.main(arguments(text, out)) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        said = failure(train, capsys, 6, *arguments(text, out, "--resume", "--steps", "4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000000003 cannot be written: " in said and "File too large" in said
    assert said.endswith(f"the last good checkpoint is {out}/checkpoints/step-000000002")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000000001", "step-000000002"]
    assert train.main(arguments(text, out, "--resume", "--steps", "4")) == 0


def test_a_loss_that_is_not_finite(
    train: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops, says which module's output was the first, and keeps the checkpoint."""
    out, bad = tmp_path / "out", tmp_path / "bad"
    assert train.main(arguments(text, out)) == 0
    model = train.Model()
    with torch.no_grad():
        model.backbone.layers[1].mixer.shared_experts.up_proj.weight[0, 0] = torch.inf
    train.save_checkpoint(model, bad)
    said = failure(train, capsys, 5, *arguments(text, tmp_path / "other", "--weights", str(bad)))
    module = "backbone.layers.1.mixer.shared_experts.up_proj"
    assert said.startswith("step 1: loss ") and f"the output of {module} is the first that is not finite" in said
    assert "there is no checkpoint yet" in said

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
        tokens = train.Tokens(path, 256)
        assert tokens.count == 1000
        for start, length in ((0, 1000), (299, 2), (300, 1), (990, 10)):
            assert tokens.read(start, length).tolist() == ids[start : start + length].tolist(), path


def test_epochs_are_shuffled_windows(train: Any, tmp_path: Path) -> None:
    """Each epoch reads every window once, in an order of its own that depends on the seed alone."""
    np.save(tmp_path / "ids.npy", np.arange(64))
    tokens = train.Tokens(tmp_path / "ids.npy", 256)
    windows = train.Windows(tokens, 0, 64, 8, seed=3)
    epochs = [[windows.shuffled(e * 8 + n).tolist() for n in range(8)] for e in range(2)]
    for epoch in epochs:
        assert sorted(x for window in epoch for x in window) == list(range(64))
    assert epochs[0] != epochs[1]
    other = train.Windows(tokens, 0, 64, 8, seed=4)
    assert [other.shuffled(n).tolist() for n in range(8)] != epochs[0]


def test_groups_of_the_optimizer(train: Any, tmp_path: Path) -> None:
    """Norms, biases, SSM vectors and embeddings do not decay; every parameter is in one group."""
    model = train.Model()
    settings = train.parse_settings(["--data", "d", "--out", "o", "--steps", "1"])
    groups = train.build_optimizer(model, settings).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)].rpartition("layers.")[2] for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert len(decayed) + len(others) == len(names)
    assert {"0.mixer.in_proj.weight", "1.mixer.gate.weight", "1.mixer.experts.up_proj", "lm_head.weight"} <= decayed
    vectors = ("A_log", "D", "dt_bias", "conv1d.bias", "norm.weight")
    assert {f"0.mixer.{name}" for name in vectors} | {"backbone.embeddings.weight", "0.norm.weight"} <= others
