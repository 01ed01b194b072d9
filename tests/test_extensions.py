"""Extensions that are absent, broken or in each other's way: what users are told, and that nobody else notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.specs import SMALL

KIND = """
from dataclasses import dataclass
from n3c.specs.block_kind import BlockKind, Module
from n3c.specs.keys import key

@dataclass(frozen=True)
class Table:
    size: int = key("Inner width.", minimum=1)

KIND = BlockKind(
    symbol="{symbol}", name="{name}", title="{name}", legend="{name}", class_name="{name}", table="{name}",
    table_class=Table, lowering="{lowering}", modules=(Module("{name}.up", "up"),), hf_names=("{name}",),
    config_keys=(),
)
"""
GATED = SMALL.replace('"MEM*E-ME"', '"MEM*E-MG"') + "[gated]\nsize = 8\n"


def distribution(site: Path, name: str, group: str, module: str) -> Path:
    """Put a distribution with one entry point `added` into a folder, as an installer would; return its metadata."""
    package = name.replace("-", "_")
    (site / f"{package}.py").write_text(module, encoding="utf-8")
    metadata = site / f"{package}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{group}]\nadded = {package}:KIND\n", encoding="utf-8")
    (metadata / "RECORD").write_text(f"{package}.py,,\n{metadata.name}/entry_points.txt,,\n", encoding="utf-8")
    return metadata / "entry_points.txt"


def kind(symbol: str = "G", name: str = "gated", lowering: str = "nowhere:lower") -> str:
    return KIND.format(symbol=symbol, name=name, lowering=lowering)


class Command:
    """`n3c` where what is in a folder is installed."""

    def __init__(self, folder: Path) -> None:
        self.site = folder / "site"
        self.site.mkdir()
        self.folder = folder
        self.chosen: str | None = None

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        own = {name: value for name, value in os.environ.items() if name != "N3C_EXTENSIONS"}
        path = os.pathsep.join(filter(None, (str(self.site), os.environ.get("PYTHONPATH"))))
        chosen = {} if self.chosen is None else {"N3C_EXTENSIONS": self.chosen}
        command = [sys.executable, "-m", "n3c.compiler", *arguments]
        environment = {**own, "PYTHONPATH": path, **chosen}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    def check(self, text: str, *arguments: str) -> tuple[int, str, str]:
        (self.folder / "spec.toml").write_text(text, encoding="utf-8")
        return self("check", "spec.toml", *arguments)


@pytest.fixture
def n3c(tmp_path: Path) -> Command:
    return Command(tmp_path)


def test_a_symbol_that_no_installed_extension_has(n3c: Command) -> None:
    code, _, said = n3c.check(GATED)
    assert code == 3
    assert "spec.toml:8:19: error[E0108]: `pattern`: `G` is not a pattern symbol" in said
    assert "extensions may add others, and none is installed" in said
    assert "error[E0102]: unknown table [gated]" in said

    distribution(n3c.site, "other", "n3c.blocks", kind("X", "other"))
    code, _, said = n3c.check(GATED)
    assert code == 3
    assert "X (other); installed extensions add others: other 1.2" in said


BROKEN = {
    "import": ("import absent_library\n", "other:KIND failed: ModuleNotFoundError: No module named 'absent_library'"),
    "exit": ("raise SystemExit(7)\n", "other:KIND failed: SystemExit: 7"),
    "absent": ("", "other:KIND failed: AttributeError: module 'other' has no attribute 'KIND'"),
    "type": ("KIND = 3\n", "other:KIND is not a BlockKind"),
    "symbol": (kind("M"), "the symbol `M` is taken by Mamba-2 of n3c"),
    "table": (kind("G", "mamba"), "the block type `mamba` is taken by Mamba-2 of n3c"),
    "digit": (kind("4"), "the symbol `4` has another meaning in patterns"),
    "long": (kind("GG"), "the symbol 'GG' is not one printable ASCII character"),
    "reserved": (kind("G", "serving"), "`serving` cannot be the name of a block kind"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_extension_is_named_where_it_is_needed_and_nowhere_else(n3c: Command, name: str) -> None:
    module, reason = BROKEN[name]
    place = distribution(n3c.site, "other", "n3c.blocks", module)
    code, _, said = n3c.check(GATED)
    assert code == 4
    assert f"{place}:2:1: error[E0521]: extension other 1.2, `added`: {reason}" in said
    assert "    2 | added = other:KIND" in said

    assert n3c.check(SMALL)[0] == 0
    code, out, _ = n3c("doctor", "--json")
    (extension,) = json.loads(out)["extensions"]
    assert code == 0
    assert reason in extension["state"]
    n3c.chosen = ""
    assert n3c.check(GATED)[0] == 3
    assert json.loads(n3c("doctor", "--json")[1])["extensions"] == []


def test_two_extensions_with_one_symbol(n3c: Command) -> None:
    distribution(n3c.site, "a-first", "n3c.blocks", kind())
    distribution(n3c.site, "b_second", "n3c.blocks", kind("G", "second"))
    code, _, said = n3c.check(GATED)
    assert code == 4
    assert "extension b_second 1.2, `added`: the symbol `G` is taken by gated of a-first 1.2" in said
    n3c.chosen = "B-Second"
    code, _, said = n3c.check(GATED.replace("[gated]", "[second]"))
    assert "is taken by" not in said


def test_a_part_of_an_extension_that_fails(n3c: Command) -> None:
    """Its lowering is imported once the spec is lowered."""
    distribution(n3c.site, "other", "n3c.blocks", kind(lowering="other:lower"))
    code, _, said = n3c.check(GATED)
    assert code == 4
    assert "error[E0521]: extension other 1.2, `added`: other:KIND failed: AttributeError" in said


def test_a_pass_that_nobody_has(n3c: Command) -> None:
    asked = SMALL + 'passes = ["faster"]\n'
    code, _, said = n3c.check(asked)
    assert code == 3
    assert f"spec.toml:{asked.count(chr(10))}:10: error[E0522]: no extension has a pass `faster`" in said
    assert "help: no extension with passes is installed" in said
    code, _, said = n3c.check(SMALL + 'passes = ["Faster!"]\n')
    assert code == 3
    assert "error[E0111]" in said


@pytest.mark.parametrize(
    ("group", "module", "arguments", "reason"),
    [
        ("n3c.passes", "KIND = 3\n", ("passes",), "other:KIND is not a Stage"),
        (
            "n3c.passes",
            "from n3c.passes.cleanup import Cleanup\nfrom n3c.passes.pipelines import Stage\n"
            "KIND = Stage(Cleanup, lambda *_: Cleanup(), after='pack')\n",
            ("passes",),
            "there is a pass `cleanup` already",
        ),
        (
            "n3c.backends",
            "from n3c.backends.added import Backend\nKIND = Backend('onnx', '', lambda spec, served: {})\n",
            ("build", "spec.toml", "--target", "other"),
            "there is a target `onnx` already",
        ),
        (
            "n3c.backends",
            "from n3c.backends.added import Backend\nKIND = Backend('out', '', lambda spec, served: {'../x': ''})\n",
            ("build", "spec.toml", "--target", "out"),
            "'../x' is not a path below the folder",
        ),
    ],
)
def test_broken_passes_and_backends(
    n3c: Command, group: str, module: str, arguments: tuple[str, ...], reason: str
) -> None:
    distribution(n3c.site, "other", group, module)
    assert n3c.check(SMALL)[0] == 0
    code, _, said = n3c(*arguments)
    assert code == 4
    assert "error[E0521]: extension other 1.2, `added`: " in said
    assert reason in said


def test_checking_a_spec_of_own_kinds_looks_for_no_extension(n3c: Command) -> None:
    distribution(n3c.site, "other", "n3c.blocks", "raise SystemExit('imported')\n")
    (n3c.folder / "spec.toml").write_text(SMALL, encoding="utf-8")
    program = (
        "import sys\nfrom n3c.compiler import check\ncheck('spec.toml')\n"
        "print([name for name in ('other', 'importlib.metadata', 'torch') if name in sys.modules])"
    )
    path = os.pathsep.join([str(n3c.site), os.environ.get("PYTHONPATH", "")])
    own = {**os.environ, "PYTHONPATH": path}
    del own["N3C_EXTENSIONS"]
    done = subprocess.run([sys.executable, "-c", program], env=own, cwd=n3c.folder, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
