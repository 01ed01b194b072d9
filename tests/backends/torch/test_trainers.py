"""PEFT, TRL and Trainer with the emitted wrapper and with transformers' own nemotron_h; `make test-oracles`.

docs/training.md has the table of it, which is compared with what is tested.
"""

from __future__ import annotations

import importlib
import json
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from .generated import tiny_spec
from .hugging_face import IDS, build, native, remote_code, trained, wrapped

ROOT = Path(__file__).parents[3]
EXACT = 1e-5
Test = TypeVar("Test", bound=Callable[..., None])
PACKAGES = ("transformers", "PEFT", "TRL", "accelerate")
TABLE: list[str] = []


def feature(name: str, theirs: str, ours: str) -> Callable[[Test], Test]:
    """Mark a test as what shows a row of the table."""
    TABLE.append(f"| {name} | {theirs} | {ours} |")
    return pytest.mark.oracles


def test_the_table_is_that_of_the_documentation() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    head = next(line for line in text.splitlines() if line.startswith("| transformers") and "TRL" in line)
    _, _, behind = text.partition(head)
    assert [line for line in behind.splitlines()[2:] if line][: len(TABLE)] == TABLE
    pinned = dict(line.split("==") for line in (ROOT / "constraints-oracles.txt").read_text().split())
    for name in PACKAGES:
        assert f"{name} {pinned[name.lower()]}" in head


@pytest.mark.oracles
def test_the_versions_are_those_of_the_table() -> None:
    for line in (ROOT / "constraints-oracles.txt").read_text().split():
        name, _, pinned = line.partition("==")
        if name in map(str.lower, PACKAGES):
            assert version(name) == pinned


def imported(name: str) -> Any:
    """Import what only the environment of these tests has."""
    return importlib.import_module(name)


@dataclass(frozen=True)
class Models:
    """The checkpoint of a tiny model, and its two readers. MTP has no loss, as the other has none."""

    folder: Path

    def ours(self) -> Any:
        model = wrapped(self.folder)
        model.config.mtp_loss_scaling_factor = 0.0
        return model

    def theirs(self) -> Any:
        return native(self.folder)

    def both(self) -> tuple[Any, Any]:
        return self.ours(), self.theirs()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    root = tmp_path_factory.mktemp("trainers")
    with remote_code(root / "modules"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        module = build(tiny_spec(), root / "torch")
        module.save_checkpoint(trained(module), root / "saved")
        yield Models(root / "saved")


# PEFT


def adapted(model: Any, **target: Any) -> Any:
    """Return a model with LoRA adapters whose both matrices are random."""
    LoraConfig: Any = imported("peft").LoraConfig
    get_peft_model: Any = imported("peft").get_peft_model

    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **target))
    torch.manual_seed(1)
    for name, parameter in sorted(peft.named_parameters()):
        if "lora_" in name and "mtp." not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return peft.train()


def gradients(model: Any, ids: Tensor = IDS) -> tuple[float, dict[str, Tensor]]:
    """Return the loss, and the gradients by names that both models have."""
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    out.loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(out.loss.detach()), {n.replace("model.backbone.", "model.model."): g for n, g in named.items()}


def check_adapter(models: Models, folder: Path, **target: Any) -> Any:
    """Every adapter of the backbone gets a gradient; saved, reloaded and merged the model computes the same."""
    PeftModel: Any = imported("peft").PeftModel

    model = adapted(models.ours(), **target)
    _, found = gradients(model)
    adapters = [n for n, p in model.named_parameters() if p.requires_grad and "mtp." not in n]
    assert adapters and all(found[n.replace("model.backbone.", "model.model.")].abs().max() > 0 for n in adapters)
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        assert (expected - models.ours()(IDS).logits).abs().max() > 1e-3
        model.save_pretrained(folder / "adapter")
        again = PeftModel.from_pretrained(models.ours(), folder / "adapter").eval()
        assert torch.equal(again(input_ids=IDS).logits, expected)
        merged = again.merge_and_unload()
        logits = merged(IDS).logits
        assert (logits - expected).abs().max() <= EXACT
        merged.save_pretrained(folder / "merged")
        assert torch.equal(wrapped(folder / "merged")(IDS).logits, logits)
        assert (native(folder / "merged")(IDS).logits - logits).abs().max() <= EXACT
    return model


def check_equal(models: Models, **target: Any) -> None:
    """The loss, and the gradient of every adapter, are those of transformers' own model."""
    ours, theirs = (gradients(adapted(model, **target)) for model in models.both())
    assert abs(ours[0] - theirs[0]) <= EXACT
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=EXACT, rtol=1e-4)


def check_refused(models: Models, **target: Any) -> None:
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        adapted(models.theirs(), **target)


@feature("PEFT, LoRA on q, k, v, o", "yes", "equal; reloads exactly, merges")
def test_attention(models: Models, tmp_path: Path) -> None:
    target = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    check_adapter(models, tmp_path, **target)
    check_equal(models, **target)


@feature("PEFT, LoRA on in_proj, out_proj", "PEFT refuses it", "yes; reloads exactly, merges")
def test_mamba(models: Models, tmp_path: Path) -> None:
    target = {"target_modules": ["in_proj", "out_proj"]}
    check_adapter(models, tmp_path, **target)
    check_refused(models, **target)


@feature("PEFT, LoRA on experts (`target_parameters`)", "yes", "equal; reloads exactly, merges")
def test_experts(models: Models, tmp_path: Path) -> None:
    names = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    target: dict[str, Any] = {"target_modules": [], "target_parameters": names}
    check_adapter(models, tmp_path, **target)
    check_equal(models, **target)


@feature("PEFT, LoRA on lm_head", "yes", "equal; reloads exactly, merges")
def test_head(models: Models, tmp_path: Path) -> None:
    check_adapter(models, tmp_path, target_modules=["lm_head"])
    check_equal(models, target_modules=["lm_head"])


@feature("PEFT, LoRA on `all-linear`", "PEFT refuses it", "yes; reloads exactly, merges")
def test_all_linear(models: Models, tmp_path: Path) -> None:
    check_adapter(models, tmp_path, target_modules="all-linear")
    check_refused(models, target_modules="all-linear")


# Trainers


def tokenizer() -> Any:
    """Return one of a token a character, with a vocabulary of 97."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = (string.ascii_letters + string.digits + string.punctuation)[:93]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {c: i + 4 for i, c in enumerate(characters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="right", **names)


def arguments(folder: Path, **own: Any) -> dict[str, Any]:
    """Return what all trainers of these tests are told."""
    common = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    steps = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return common | steps | {"save_strategy": "no", "gradient_checkpointing": False} | own


def history(trainer: Any, *keys: str) -> list[float]:
    """Return what a trainer logged under some keys, step by step."""
    return [float(entry[key]) for entry in trainer.state.log_history for key in keys if key in entry]


def check_same_run(run: Callable[[Any], Any], models: Models, *keys: str, rtol: float = 1e-4) -> None:
    """Losses and norms of gradients, of three steps, are those of transformers' own model."""
    keys = ("loss", "grad_norm", *keys)
    ours, theirs = (history(run(model), *keys) for model in models.both())
    assert len(theirs) >= 4
    assert ours == pytest.approx(theirs, rel=rtol, abs=1e-5)


def texts() -> Any:
    Dataset: Any = imported("datasets").Dataset

    return Dataset.from_dict({"text": ["".join(chr(97 + i * j % 26) for j in range(5 + i % 7)) for i in range(16)]})


def sft(model: Any, folder: Path, callbacks: Any = None, **options: Any) -> Any:
    SFTConfig: Any = imported("trl").SFTConfig
    SFTTrainer: Any = imported("trl").SFTTrainer

    settings = SFTConfig(**arguments(folder, **options))
    trainer = SFTTrainer(model, args=settings, train_dataset=texts(), processing_class=tokenizer(), callbacks=callbacks)
    trainer.train()
    return trainer


@feature("TRL SFTTrainer", "yes", "equal")
def test_sft(models: Models, tmp_path: Path) -> None:
    check_same_run(lambda model: sft(model, tmp_path), models, "entropy", "mean_token_accuracy")


@feature("TRL SFTTrainer, `loss_type` nll and dft, accumulation", "yes", "equal")
def test_sft_losses(models: Models, tmp_path: Path) -> None:
    for kind in ("nll", "dft"):
        options = {"loss_type": kind, "gradient_accumulation_steps": 2}
        check_same_run(partial(sft, folder=tmp_path, **options), models)


@feature("TRL SFTTrainer, packing, padding-free", "needs mamba_ssm (a GPU)", "as the documents alone")
def test_sft_packing(models: Models, tmp_path: Path) -> None:
    """Padding-free batches have the losses of padded ones; packed ones are the collator's own documents."""
    whole = sft(models.ours(), tmp_path)
    free = sft(models.ours(), tmp_path, padding_free=True, max_length=None)
    assert history(free, "loss", "grad_norm") == pytest.approx(history(whole, "loss", "grad_norm"), rel=1e-4)
    packed = history(sft(models.ours(), tmp_path, packing=True, max_length=16), "loss")
    assert len(packed) == 3 and packed[0] == pytest.approx(history(whole, "loss")[0], abs=0.5)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        sft(models.theirs(), tmp_path, packing=True, max_length=16)


@feature("TRL DPOTrainer", "yes", "equal")
def test_dpo(models: Models, tmp_path: Path) -> None:
    Dataset: Any = imported("datasets").Dataset
    DPOConfig: Any = imported("trl").DPOConfig
    DPOTrainer: Any = imported("trl").DPOTrainer

    columns = {"prompt": ["abc", "bcd", "cde", "xyz"], "chosen": ["defg", "ef", "fga", "a"]}
    pairs = Dataset.from_dict({k: v * 2 for k, v in (columns | {"rejected": ["zz", "yyw", "xx", "www"]}).items()})

    def run(model: Any) -> Any:
        settings = DPOConfig(**arguments(tmp_path))
        trainer = DPOTrainer(model, args=settings, train_dataset=pairs, processing_class=tokenizer())
        trainer.train()
        return trainer

    check_same_run(run, models, "rewards/margins")


@feature("TRL GRPOTrainer, which generates", "yes", "equal")
def test_grpo(models: Models, tmp_path: Path) -> None:
    Dataset: Any = imported("datasets").Dataset
    GRPOConfig: Any = imported("trl").GRPOConfig
    GRPOTrainer: Any = imported("trl").GRPOTrainer

    prompts = Dataset.from_dict({"prompt": ["abc", "bcdefg", "cde", "xyzab"] * 2})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    def run(model: Any) -> Any:
        settings = GRPOConfig(**arguments(tmp_path, max_steps=2, num_generations=4, max_completion_length=6))
        trainer = GRPOTrainer(
            model, reward_funcs=reward, args=settings, train_dataset=prompts, processing_class=tokenizer()
        )
        trainer.train()
        return trainer

    check_same_run(run, models, "reward", "entropy", rtol=1e-3)


def rows() -> list[dict[str, list[int]]]:
    """Return token ids of several lengths, and their labels."""
    ids = [(torch.arange(6 + i % 5) * (i + 1) % 97).tolist() for i in range(16)]
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model: Any, folder: Path, flat: bool = False, callbacks: Any = None, **options: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

    examples: Any = rows()  # the Trainer takes any sequence
    return Trainer(
        model,
        args=TrainingArguments(**arguments(folder, **options)),
        train_dataset=examples,
        eval_dataset=examples[:6],
        data_collator=DataCollatorWithFlattening() if flat else DataCollatorForSeq2Seq(tokenizer()),
        callbacks=callbacks,
    )


def run_trainer(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> Any:
    trainer = trainer_of(model, folder, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@feature("Trainer, padded batches, evaluation", "yes", "equal, `eval_loss` without MTP")
def test_trainer(models: Models, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
    check_same_run(lambda model: run_trainer(model, tmp_path, **options), models, "eval_loss")
    with_mtp = wrapped(models.folder)
    before = trainer_of(with_mtp, tmp_path).evaluate()["eval_loss"]
    assert before == pytest.approx(trainer_of(models.theirs(), tmp_path).evaluate()["eval_loss"], rel=1e-5)


@feature("Trainer, accumulation", "yes", "equal, and equal to one batch, with MTP too")
def test_accumulation(models: Models, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    check_same_run(lambda model: run_trainer(model, tmp_path, **parts), models)
    runs = [run_trainer(wrapped(models.folder), tmp_path, **options) for options in ({}, parts)]
    whole, accumulated = (history(run, "loss", "grad_norm") for run in runs)
    assert accumulated == pytest.approx(whole, rel=1e-4)


@feature("Trainer, DataCollatorWithFlattening as it is", "mixes documents", "as the documents alone")
def test_flattening(models: Models, tmp_path: Path) -> None:
    """The documents of a row are told apart by position_ids alone."""
    runs = [run_trainer(models.ours(), tmp_path, flat=flat) for flat in (False, True)]
    padded, flat = (history(run, "loss", "grad_norm") for run in runs)
    assert flat == pytest.approx(padded, rel=1e-4)
    theirs = history(run_trainer(models.theirs(), tmp_path, flat=True), "loss", "grad_norm")
    assert theirs != pytest.approx(padded, rel=1e-3)


@feature("Trainer, `load_best_model_at_end`", "loses the experts", "exact")
def test_best_model(models: Models, tmp_path: Path) -> None:
    """A rate that ruins the model after the first step: the best is behind."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options: dict[str, Any] = best | {
        "load_best_model_at_end": True,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
    }
    for kind, load, restored in (("ours", models.ours, True), ("theirs", models.theirs, False)):
        trainer = run_trainer(load(), tmp_path / kind, **options)
        assert Path(trainer.state.best_model_checkpoint).name != "checkpoint-3"
        again = trainer.evaluate()["eval_loss"]
        assert (again == pytest.approx(trainer.state.best_metric, rel=1e-6)) is restored, kind


@feature("Trainer, `resume_from_checkpoint`", "loses the experts", "exact")
def test_resume(models: Models, tmp_path: Path) -> None:
    for kind, load, exact in (("ours", models.ours, True), ("theirs", models.theirs, False)):
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        whole = run_trainer(load(), tmp_path / kind, **options)
        again = run_trainer(load(), tmp_path / kind, tmp_path / kind / "checkpoint-2", **options)
        expected = whole.model.state_dict()
        same = all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
        assert same is exact, kind


@feature("Trainer, gradient checkpointing", "yes", "equal")
def test_gradient_checkpointing(models: Models, tmp_path: Path) -> None:
    check_same_run(lambda model: run_trainer(model, tmp_path, gradient_checkpointing=True), models)


@feature("Trainer and TRL, the routers' bias and balance loss", "no", "`model.router_balance()`")
def test_router_balance(models: Models, tmp_path: Path) -> None:
    """Each bias takes steps of the rate; the balance loss is in the gradients, and in no reported loss."""
    for run in (run_trainer, sft):
        model = models.ours()
        before = {name: bias.clone() for name, bias in model.named_buffers()}
        balanced = run(model, tmp_path, callbacks=[model.router_balance(bias_rate=1e-3, balance_factor=1.0)])
        plain = run(models.ours(), tmp_path)
        assert history(balanced, "loss")[0] == pytest.approx(history(plain, "loss")[0], rel=1e-6)
        assert history(balanced, "grad_norm")[0] != pytest.approx(history(plain, "grad_norm")[0], rel=1e-3)
        moved = [(bias - before[name]).abs().max() for name, bias in model.named_buffers() if "mtp." not in name]
        assert len(moved) == 3 and all(0.999e-3 <= m <= 3.001e-3 for m in moved)
        assert all(router.balance_factor == 0 for router in model.modules() if hasattr(router, "balance_factor"))


@feature("config.json and tensors that `save_pretrained` writes", "`nemotron_h`", "`nemotron_h`, for both")
def test_saved(models: Models, tmp_path: Path) -> None:
    model = models.ours()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nemotron_h"
    with torch.no_grad():
        assert (native(tmp_path)(IDS).logits - model(IDS).logits).abs().max() <= EXACT
