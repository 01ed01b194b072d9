"""The package as it is shipped: every subpackage listed, one identity for every module, nothing of one machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("backends", "compiler", "ir", "passes", "runtime", "specs")


def tracked() -> list[Path]:
    """Return the files of the repository, or of an unpacked archive of it."""
    if not (ROOT / ".git").exists():
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_every_subpackage_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "n3c." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == listed
    for folder in FOLDERS:
        assert (ROOT / folder / "py.typed").is_file()


def test_modules_have_one_name() -> None:
    """From the root `import ir` works too, and would make a second identity of every class."""
    wrong = re.compile(rf"^\s*(from|import) ({'|'.join(FOLDERS)})\b", re.MULTILINE)
    for path in tracked():
        if path.suffix == ".py" and path.parts[len(ROOT.parts)] in (*FOLDERS, "tests", "benchmarks"):
            assert not wrong.search(path.read_text(encoding="utf-8")), path


def test_pinned_versions_cover_what_is_required() -> None:
    lines = [line for path in ROOT.glob("constraints*.txt") for line in path.read_text().split()]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert all("==" in line for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-") for requirement in required}
    assert names <= pinned


def test_nothing_names_a_machine() -> None:
    places = re.compile(r"/(home|root|mnt|Users)/|file:///(?!tmp)|https?://[\w.-]*(pypi|mirror|artifact)[\w.-]*")
    for path in tracked():
        if path.suffix in {".py", ".md", ".toml", ".txt", ".jinja", ""} and path != Path(__file__):
            found = places.search(path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{path}: {found.group() if found else ''}"


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared: dict[str, set[str]] = {}
    for extra, requirements in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in requirements:
            name = re.match(r"[\w.-]+", requirement)
            assert name is not None
            declared.setdefault(name.group(), set()).add(extra)
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w, ]*?) ?\| ([^|]+) \| ([^|]+) \|$", page, flags=re.MULTILINE)
    explained = {name: set(extras.split(", ")) for name, extras, _, _ in rows if name not in ("package", "---")}
    assert explained == declared
