"""Every config.json that n3c writes, and the generated wrapper, in six releases of transformers.

`make test-oracles` runs it; docs/training.md has the table of what came of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from n3c.backends.torch.loading import load_package
from support.checkpoints import write_checkpoint
from support.command import n3c, write_small
from support.specs import small_spec
from support.transformers_releases import RELEASES, ROOT, run_python

from .generated import tiny_spec, write_generated

pytestmark = pytest.mark.oracles

READING = ROOT / "tests" / "support" / "transformers_reading.py"
WRAPPER_TESTS = "tests/backends/torch/test_huggingface.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of each command that writes a config.json; those of `save_checkpoint` have logits, too."""
    root = tmp_path_factory.mktemp("written")
    spec = write_small(root)
    folders = {name: root / name for name in ("export-config", "build", "quantize")}
    folders["export-config"].mkdir()
    write_checkpoint(root / "source", small_spec())
    for command in (
        ("export-config", spec, "-o", folders["export-config"] / "config.json"),
        ("build", spec, "--target", "torch", "-o", root / "built"),
        ("quantize", "--weights", root / "source", "-o", folders["quantize"]),
    ):
        result = n3c(*command)
        assert result.code == 0, result.err
    folders["build"] = root / "built" / "torch"
    for name, pattern, mtp in (("saved", "MEM*E-ME", "*E"), ("saved without MTP", "MEM*E", None)):
        folders[name] = root / name
        save(root / f"{name}, package", folders[name], pattern, mtp)
    return folders


def save(package: Path, folder: Path, pattern: str, mtp: str | None) -> None:
    """Write a checkpoint by the generated package, with token ids and the logits of model.py."""
    write_generated(tiny_spec(pattern, mtp=mtp), package)
    module = load_package(package)
    torch.manual_seed(0)
    model = module.Model().eval()
    module.save_checkpoint(model, folder)
    ids = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.save(model(ids).logits, folder / "expected.pt")
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))


@pytest.mark.parametrize("release", RELEASES)
def test_each_config_and_transformers_own_model(written: dict[str, Path], release: str) -> None:
    ran = run_python(release, str(READING), *map(str, written.values()))
    assert ran.returncode == 0, ran.stderr
    found: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    for name, read in zip(written, found, strict=True):
        config = json.loads((written[name] / "config.json").read_text())
        assert read["pattern"] == config["hybrid_override_pattern"], name
        assert read["mtp_pattern"] == config.get("mtp_hybrid_override_pattern", "*E"), name
        assert read["num_hidden_layers"] == config["num_hidden_layers"] == len(read["pattern"]), name
        if "logits" in read:
            assert read["class"] == "transformers.models.nemotron_h.modeling_nemotron_h.NemotronHForCausalLM"
            expected = torch.load(written[name] / "expected.pt")
            assert (torch.tensor(read["logits"]) - expected).abs().max() <= 1e-5, name
    assert sum("logits" in read for read in found) == 2


@pytest.mark.parametrize("release", [name for name in RELEASES if name not in ("5.12.1", "5.14.1")])
def test_the_wrapper(release: str) -> None:
    """Its tests, all of them; older releases pass most (docs/training.md)."""
    ran = run_python(release, "-m", "pytest", "-q", "-p", "no:cacheprovider", WRAPPER_TESTS)
    assert ran.returncode == 0, ran.stdout
    assert " skipped" not in ran.stdout
