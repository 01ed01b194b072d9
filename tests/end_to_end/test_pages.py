"""The pages for visitors: their blocks are run in order, in one folder, by a shell with n3c on its PATH."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.command import n3c
from support.pages import blocks
from support.shell import environment, parse

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/start").glob("*.md"))
SLOW = ("checkpoint", "serve", "train")


@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a shell of Unix")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page.stem in SLOW else (), id=page.stem) for page in PAGES],
)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    run = [block.code for block in blocks(page) if block.why_not is None]
    assert run
    variables, work = environment(tmp_path), tmp_path / "work"
    work.mkdir()
    script = "set -eux\n" + "\n".join(run)
    done = subprocess.run(
        ["bash", "-c", script], env=variables, cwd=work, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_line_of_a_command_parses(page: Path, trainer_flags: set[str]) -> None:
    lines = re.findall(r"^(?:n3c|python|torchrun) .+$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(lines) > 3
    for line in lines:
        if line.startswith("n3c "):
            parse(line)
        elif "train.py" in line:
            assert set(re.findall(r" (--[a-z-]+)", line.partition("train.py")[2])) <= trainer_flags


def test_a_block_says_why_it_is_not_run() -> None:
    unrun = {page.stem: [block.why_not for block in blocks(page) if block.why_not] for page in PAGES}
    assert sum(map(len, unrun.values())) == sum(
        page.read_text(encoding="utf-8").count("Not run by the test") for page in PAGES
    )
    assert not unrun["checkpoint"]


@pytest.fixture(scope="module")
def trainer_flags(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the options of a generated train.py, as its help lists them."""
    out = tmp_path_factory.mktemp("built") / "out"
    assert n3c("build", "tiny", "--target", "torch", "-o", out).code == 0
    help_ = subprocess.run(
        [sys.executable, str(out / "torch/train.py"), "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    return set(re.findall(r"--[a-z-]+", help_.stdout))
