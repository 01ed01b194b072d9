"""`make mutants`: change one point of the code at a time, and ask whether the tests of its folder notice.

A mutant is a comparison, an operator, a boolean or a number that is another one. A random sample with a seed is taken
of all of them; each is made in a copy of the tree and meets the tests that mirror its file (`tests/ir` for `ir`, a
file's own test first). Tests that take longer than the limit decide nothing, and are counted apart. Survivors are to be
judged: a weak test, or a change that means the same.

    python -m benchmarks.mutants --count 40 --seed 1 --seconds 1500
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("ir", "passes", "specs", "backends", "runtime/generation")
SWAPPED: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in",
    ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is", ast.And: "or", ast.Or: "and", ast.Add: "-", ast.Sub: "+",
    ast.Mult: "//", ast.FloorDiv: "*",
}  # fmt: skip
"""Operator → the one that stands for it in a mutant."""


@dataclass(frozen=True)
class Mutant:
    """One point of a file, and what stands there instead."""

    path: str
    line: int
    before: str
    after: str
    start: int
    end: int

    def applied(self, text: str) -> str:
        """Return the file's text with the change."""
        return text[: self.start] + self.after + text[self.end :]


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Yield the mutants of a file, in the order of the tree; those that Python cannot parse are left out."""
    text = path.read_text(encoding="utf-8")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = text.splitlines()

    def offset(row: int, column: int) -> int:
        return starts[row - 1] + len(lines[row - 1].encode()[:column].decode())

    def made(node: ast.expr, after: str) -> Iterator[Mutant]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, end = offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
        if text[start:end] not in (after, ""):
            yield Mutant(path.relative_to(ROOT).as_posix(), node.lineno, text[start:end], after, start, end)

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
            left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
            yield from made(node, f"({left} {SWAPPED[type(node.ops[0])]} {right})")
        elif isinstance(node, ast.BoolOp):
            yield from made(node, "(" + f" {SWAPPED[type(node.op)]} ".join(map(ast.unparse, node.values)) + ")")
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            left, right = ast.unparse(node.left), ast.unparse(node.right)
            yield from made(node, f"({left} {SWAPPED[type(node.op)]} ({right}))")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield from made(node, f"({ast.unparse(node.operand)})")
        elif isinstance(node, ast.Constant) and type(node.value) is int and node.value < 1 << 16:
            yield from made(node, str(node.value + 1))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield from made(node, str(not node.value))


def tests_of(path: str) -> list[str]:
    """Return the tests of a file: its own first, then those of the nearest folder that mirrors its own."""
    own = [str(found.relative_to(ROOT)) for found in ROOT.glob(f"tests/**/test_{Path(path).stem}.py")]
    folder = Path(path).parent
    while not (ROOT / "tests" / folder).is_dir():
        folder = folder.parent
    return [*own, f"tests/{folder.as_posix()}"]


def survives(mutant: Mutant, tree: Path, limit: float) -> bool | None:
    """Whether every test of the file passes with the change; None where they take longer than `limit` seconds."""
    place = tree / mutant.path
    text = place.read_text(encoding="utf-8")
    place.write_text(mutant.applied(text), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests_of(mutant.path)]
    environment = os.environ | {"PYTHONPATH": str(tree / "import"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"NUMBA_CACHE_DIR": str(tree / "numba")}  # a cache of the unchanged code would hide the change
    shutil.rmtree(tree / "numba", ignore_errors=True)
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=limit, check=False)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return None
    finally:
        place.write_text(text, encoding="utf-8")


def copied(folder: Path) -> Path:
    """Return a copy of the tree in which `n3c` is imported from the copy."""
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    (tree / "import").mkdir()
    (tree / "import" / "n3c").symlink_to(tree / "typings" / "n3c")
    return tree


def main() -> None:
    """Take a sample, and print the score by folder and the survivors as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="of the whole run")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one mutant")
    options = parser.parse_args()
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    points = [mutant for path in files for mutant in mutants_of(path)]
    sample = random.Random(options.seed).sample(points, options.count)
    end = time.monotonic() + options.seconds
    tried: Counter[str] = Counter()
    survivors: list[Mutant] = []
    undecided = 0
    with tempfile.TemporaryDirectory(prefix="n3c-mutants-") as folder:
        tree = copied(Path(folder))
        for mutant in sample:
            if time.monotonic() > end:
                break
            verdict = survives(mutant, tree, options.limit)
            undecided += verdict is None
            tried[mutant.path.split("/")[0]] += verdict is not None
            if verdict:
                survivors.append(mutant)
                print(f"survives: {mutant.path}:{mutant.line}: {mutant.before} → {mutant.after}", file=sys.stderr)
    left = Counter(mutant.path.split("/")[0] for mutant in survivors)
    score = {folder: {"tried": count, "noticed": count - left[folder]} for folder, count in sorted(tried.items())}
    result = {"seed": options.seed, "points": len(points), "undecided": undecided, "score": score}
    result["survivors"] = [asdict(mutant) for mutant in survivors]
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
