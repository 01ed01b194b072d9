"""`n3c init`, `n3c specs`, and shipped specs by their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from n3c.specs.load import load_spec
from support.command import n3c
from support.specs import SPECS

ROOT = Path(__file__).parents[3]
NAMES = sorted(path.stem for path in SPECS.glob("*.toml"))


def test_every_shipped_spec_is_listed_with_its_layers() -> None:
    listed = n3c("specs", "--json").data["specs"]
    assert sorted(entry["name"] for entry in listed) == NAMES
    assert {entry["name"]: entry["layers"]["total"] for entry in listed}["super"] == 88
    text = n3c("specs").out
    assert re.search(r"^super +Nemotron 3 Super 120B-A12B: 120.67B parameters", text, re.MULTILINE)


def test_a_name_stands_for_a_shipped_spec_in_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert n3c("check", "super", "tiny").out.startswith("super: ok (nemotron-3-super-120b-a12b), 88 layers")
    assert n3c("inspect", "tiny", "--json").data == n3c("inspect", SPECS / "tiny.toml", "--json").data
    assert n3c("export-config", "tiny").out == n3c("export-config", SPECS / "tiny.toml").out
    assert n3c("build", "tiny", "--target", "torch").code == 0
    assert load_spec(tmp_path / "build/tiny/spec.toml")[0] == load_spec(SPECS / "tiny.toml")[0]


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("super").write_text("schema = 2\n", encoding="utf-8")
    assert "super:1:" in n3c("check", "super").err


def test_a_name_of_nothing_gets_the_closest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean `super`?" in n3c("check", "supr").err
    assert f"shipped: {', '.join(NAMES[:2])}" in n3c("check", "qqq").err
    assert "did you mean `ultra`?" in n3c("inspect", "ultr").err


def test_a_new_spec_is_named_by_its_file_and_is_good(tmp_path: Path) -> None:
    file = tmp_path / "my-first.toml"
    result = n3c("init", file)
    assert result.err.splitlines()[-1] == f"next: n3c check {file}"
    spec, warnings = load_spec(file)
    assert (spec.name, warnings) == ("my-first", [])
    assert n3c("check", file, "--warnings-as-errors").code == 0
    assert n3c("init", file).code == 6
    assert n3c("init", file, "--force").code == 0
    assert n3c("init", tmp_path / "No Name.toml").code == 0
    assert load_spec(tmp_path / "No Name.toml")[0].name == "my-model"


def test_what_is_for_standard_output_goes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begun = n3c("init", "-", "--from", "super")
    assert (begun.code, begun.err) == (0, "")
    assert begun.out == (SPECS / "super.toml").read_text(encoding="utf-8")
    assert n3c("init", "-", "--json").data["out"] is None
    config = n3c("export-config", "super", "-o", "-")
    assert (config.code, config.out) == (0, n3c("export-config", "super").out)
    (tmp_path / "config.json").write_text(config.out)
    imported = n3c("import", "config.json", "-o", "-")
    assert (imported.code, imported.out) == (0, n3c("import", "config.json").out)
    for command in (("inspect", "super"), ("diff", "super", "ultra")):  # which print something else there
        page = n3c(*command, "--html", "-", "--json")
        assert (page.code, page.codes) == (6, ["E0602"])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_shipped_spec_keeps_its_comments(name: str, tmp_path: Path) -> None:
    file = tmp_path / "copy.toml"
    assert n3c("init", "--from", name, file).code == 0
    text = (SPECS / f"{name}.toml").read_text(encoding="utf-8")
    assert file.read_text(encoding="utf-8") == re.sub(r'^name = ".*"', 'name = "copy"', text, flags=re.MULTILINE)


def test_a_copy_is_not_written_over_its_source(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    assert n3c("init", file).code == 0
    assert n3c("init", "--from", file, file, "--force").code == 6


def test_the_readme_shows_the_spec_that_init_writes(tmp_path: Path) -> None:
    assert n3c("init", tmp_path / "my-model.toml").code == 0
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```toml\n{(tmp_path / 'my-model.toml').read_text(encoding='utf-8')}```" in readme
