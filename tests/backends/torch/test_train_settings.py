"""What `train.py` refuses before it begins: each condition at its boundary, and one step beyond."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .generated import imported, tiny_spec, write_generated

GIVEN = {"data": "d", "out": "o", "steps": 1, "numerics": "float32"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the generated module of settings."""
    folder = tmp_path_factory.mktemp("settings")
    write_generated(tiny_spec("MEM*E", mtp="*E"), folder)
    with imported(folder) as found:
        yield found.settings


def problems(settings: Any, values: dict[str, Any]) -> list[str]:
    found: list[str] = settings.impossible(settings.Settings(**GIVEN | values))
    return found


DEFAULTS = {
    "batch_size": 16, "seq_len": 256, "accumulation": 1, "document_separator": -1, "tokenizer": "",
    "data_format": "auto", "text_field": "text", "messages_field": "", "dtype": "", "document_boundaries": True,
    "token_cache": "", "token_cache_gb": 100.0, "seed": 0, "numerics": "", "weights": "", "init": "published",
    "teacher": "", "quantized": "", "activations": "stored", "frozen_scales": False, "train": "*", "freeze": "",
    "optimizer": "adamw", "lr": 1e-3, "final_lr": 0.01, "schedule": "wsd", "warmup": 0.02, "decay": 0.2,
    "weight_decay": 0.1, "no_decay": "embedding", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip": 1.0, "ema": 0.0,
    "bias_rate": 1e-3, "balance": 1e-4, "expert_parallel": 1, "tensor_parallel": 1,
    "activation_checkpointing": "none", "compile": False, "save_every": 1000, "keep": 2, "async_checkpoints": True,
    "resume": False, "resume_step": 0, "val_data": "", "val_fraction": 0.05, "export_dtype": "float32",
    "val_every": 200, "val_sequences": 32, "log_every": 10, "tensorboard": False, "wandb": "", "profile_step": 0,
    "peak_tflops": 0.0,
}  # fmt: skip
"""Option → its default: who trains with none of them relies on each."""


def test_defaults(settings: Any) -> None:
    required = {"data": "d", "out": "o", "steps": 1}
    assert vars(settings.Settings(**required)) == required | DEFAULTS


@pytest.mark.parametrize("name", ["data", "val_data", "weights", "teacher", "quantized"])
def test_nothing_is_written_inside_what_is_read(settings: Any, name: str, tmp_path: Path) -> None:
    """`metrics.jsonl` would be data of the next run."""
    (tmp_path / "read").mkdir()
    (tmp_path / "link").symlink_to("read")
    told = f"--out is inside --{name.replace('_', '-')}"
    for out, refused in (("read", True), ("read/a/b", True), ("link/out", True), ("reader", False), (".", False)):
        values = {name: str(tmp_path / "read"), "out": str(tmp_path / out)}
        assert (told in problems(settings, values)) is refused
    assert not settings.around(settings.Settings(**GIVEN | {name: str(tmp_path), "out": "\0"}))


@pytest.mark.parametrize("name", ["steps", "save_every", "profile_step", "lr"])
def test_whole_numbers_have_64_bits(settings: Any, name: str) -> None:
    for wrong in (2**63, -(2**63) - 1, 10**400):
        with pytest.raises(settings.TrainError, match=f"{name} has more than 64 bits") as error:
            settings.checked({"data": "d", "out": "o", "steps": 1, name: wrong})
        assert error.value.code == 2
    with pytest.raises(settings.TrainError) as error:  # a number, which is no possible one
        settings.checked({"data": "d", "out": "o", "steps": 1, name: -(2**63)})
    assert "64 bits" not in str(error.value)
    assert settings.checked(GIVEN | {"save_every": 2**63 - 1}).save_every == 2**63 - 1


LONGEST, VOCABULARY = tiny_spec().model.max_position_embeddings, tiny_spec().model.vocab_size


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"steps": 1, "batch_size": 1, "accumulation": 1, "save_every": 1, "keep": 1, "log_every": 1},
        {"seq_len": 2},
        {"seq_len": LONGEST},
        {"seed": 2**63 - 1},
        {"batch_size": 1 << 20},
        {"document_separator": -1},
        {"document_separator": VOCABULARY - 1},
        {"beta1": 0.999, "beta2": 0.999, "val_fraction": 0.999},
        {"warmup": 0.5, "decay": 0.5},
        {"final_lr": 1.0},
        {"val_every": 0, "val_sequences": 1},
        {"compile": True, "activation_checkpointing": "none", "tensor_parallel": 1},
        {"activation_checkpointing": "all"},
        {"activation_checkpointing": "mamba2,moe"},
        {"teacher": "t", "quantized": "q"},
        {"teacher": "t", "quantized": "q", "numerics": "bf16", "frozen_scales": True},
        {"quantized": "q", "teacher": "t", "expert_parallel": 1, "tensor_parallel": 1},
        {"resume_step": 0, "profile_step": 0},
        {"optimizer": "muon", "numerics": "bf16"},
        {"ema": 0.0, "weight_decay": 0.0, "beta1": 0.0, "final_lr": 0.0, "warmup": 0.0, "decay": 0.0},
    ],
    ids=str,
)
def test_what_is_possible(settings: Any, values: dict[str, Any]) -> None:
    assert problems(settings, values) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        *(({name: 0}, f"--{name.replace('_', '-')} must be at least 1")
          for name in ("steps", "batch_size", "accumulation", "save_every", "keep", "log_every", "tensor_parallel",
                       "expert_parallel")),
        ({"seq_len": 1}, f"--seq-len 1 is not from 2 to {LONGEST}"),
        ({"seq_len": LONGEST + 1}, f"--seq-len {LONGEST + 1} is not from 2 to {LONGEST}"),
        ({"seed": -1}, f"--seed -1 is not from 0 to {2**63 - 1}"),
        ({"seed": 2**63}, f"--seed {2**63} is not from 0 to {2**63 - 1}"),
        ({"batch_size": (1 << 20) + 1}, f"--batch-size {(1 << 20) + 1} is more than {1 << 20}"),
        ({"document_separator": -2}, f"--document-separator -2 is not from -1 to {VOCABULARY - 1}"),
        ({"document_separator": VOCABULARY}, f"--document-separator {VOCABULARY} is not from -1 to {VOCABULARY - 1}"),
        ({"numerics": "fp4"}, "--numerics fp4 is none of float32, bf16, bf16-split"),
        ({"activation_checkpointing": "mamba2,gru"}, "--activation-checkpointing: gru is none of all, none, mamba2"),
        ({"export_dtype": "float16"}, "--export-dtype float16 is none of float32, bfloat16"),
        ({"compile": True, "tensor_parallel": 2}, "--compile cannot be combined with --tensor-parallel"),
        ({"compile": True, "expert_parallel": 2}, "--compile cannot be combined with --expert-parallel"),
        ({"compile": True, "activation_checkpointing": "all"},
         "--compile cannot be combined with --activation-checkpointing"),
        *(({name: 0.0}, "--lr, --clip and --eps must be more than 0") for name in ("lr", "clip", "eps")),
        *(({name: 1.0}, "--beta1, --beta2, --val-fraction and --ema must be less than 1")
          for name in ("beta1", "beta2", "val_fraction", "ema")),
        ({"warmup": 0.5, "decay": 0.51}, "--warmup and --decay must fit into --steps, --final-lr be at most 1"),
        ({"final_lr": 1.01}, "--warmup and --decay must fit into --steps, --final-lr be at most 1"),
        *(({"teacher": "t", "quantized": "q", **given}, f"--teacher cannot be combined with {told}")
          for given, told in (({"numerics": "bf16-split"}, "--numerics bf16-split"), ({"compile": True}, "--compile"),
                              ({"expert_parallel": 2}, "--expert-parallel"), ({"tensor_parallel": 2}, "--tensor-par"),
                              ({"compile": True, "numerics": "bf16-split"}, "--numerics bf16-split, --compile"))),
        ({"teacher": "t"}, "--teacher and --quantized need each other"),
        ({"quantized": "q"}, "--teacher and --quantized need each other"),
        ({"frozen_scales": True}, "--frozen-scales needs --quantized"),
        ({"optimizer": "muon", "numerics": "bf16-split"}, "--optimizer muon cannot be combined with --numerics bf16-s"),
        ({"resume_step": -1}, "--resume-step and --profile-step must be at least 0"),
        ({"profile_step": -1}, "--resume-step and --profile-step must be at least 0"),
        ({"val_every": -1}, "--val-every must be at least 0, --val-sequences at least 1"),
        ({"val_sequences": 0}, "--val-every must be at least 0, --val-sequences at least 1"),
    ],
)  # fmt: skip
def test_what_is_not(settings: Any, values: dict[str, Any], problem: str) -> None:
    (found,) = problems(settings, values)
    assert found.startswith(problem)


@pytest.mark.parametrize("name", ["lr", "decay", "clip", "peak_tflops"])
def test_numbers_are_finite_and_none_is_negative(settings: Any, name: str) -> None:
    for wrong in (-1e-9, float("nan"), float("inf"), -1):
        with pytest.raises(settings.TrainError, match=f"{name} = {float(wrong)} is not a number of at least 0"):
            settings.checked(GIVEN | {name: wrong})
    found = settings.checked(GIVEN | {"steps": 9, name: 1})
    assert type(getattr(found, name)) is float


def test_all_that_is_wrong_is_told(settings: Any) -> None:
    """At once, each by its name."""
    with pytest.raises(settings.TrainError) as error:
        settings.checked({"data": 1, "steps": True, "resume": 1, "extra": 0, "seed": 2**63})
    assert str(error.value).split("; ") == [
        *("extra is no setting", "data = 1 is no str", "--out is missing", "steps = True is no int"),
        *("seed has more than 64 bits", "resume = 1 is no bool"),
    ]
    assert error.value.code == 2
    assert (settings.USAGE, settings.NOT_FINITE, settings.FILES, settings.STOPPED) == (2, 5, 6, 143)


@pytest.mark.parametrize(
    ("values", "numerics"),
    [
        ({}, "bf16-split"),
        ({"accumulation": 1, "optimizer": "adamw", "teacher": ""}, "bf16-split"),
        ({"accumulation": 2}, "bf16"),
        ({"optimizer": "muon"}, "bf16"),
        ({"teacher": "t", "quantized": "q"}, "bf16"),
    ],
)
def test_numerics_of_a_gpu(
    settings: Any, values: dict[str, Any], numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    assert settings.checked({"data": "d", "out": "o", "steps": 1, **values}).numerics == numerics


def test_phases(settings: Any) -> None:
    """From 1 on they are steps, below a part of all."""
    ten = settings.Settings(data="d", out="o", steps=10)
    assert [ten.in_steps(phase) for phase in (0.0, 0.5, 0.99, 1.0, 2.0)] == pytest.approx([0, 5, 9.9, 1, 2])


def test_the_longest_settings(settings: Any, tmp_path: Path) -> None:
    path, lines = tmp_path / "settings.toml", "steps = 1\n"
    path.write_text(lines + "#" * (65536 - len(lines)))
    assert settings.read_settings(path) == {"steps": 1}
    path.write_text(lines + "#" * (65537 - len(lines)))
    with pytest.raises(ValueError, match="larger than 65536 bytes, so no settings"):
        settings.read_settings(path)


def test_options_are_written_in_full(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "d", "--out", "o", "--steps", "1"]
    with pytest.raises(SystemExit):
        settings.parse_settings("", [*given, "--see", "3"])
    assert "unrecognized arguments: --see 3" in capsys.readouterr().err
    assert settings.parse_settings("", [*given, "--no-async-checkpoints"]).async_checkpoints is False
