"""Generated packages, imported: from a build, or straight from what `emit` returns."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_numbers = itertools.count()


def load_package(source: Path | Mapping[str, str], parts: Sequence[str] = ()) -> Any:
    """Import a generated package under a unique name, so that several can be imported, and return it.

    `source` is the package's folder, `OUT/torch`, or the files that `emit` returns. Those leave nothing on disk, so
    that `save_checkpoint` writes weights and config.json without code; modules that the package does not import by
    itself are named in `parts`, as `training.data`. Raises FileNotFoundError where the folder holds no package, and
    whatever the generated code raises.
    """
    if isinstance(source, Path):
        return _imported(_package_folder(source))
    with tempfile.TemporaryDirectory(prefix="n3c-") as folder:
        write_files(source, Path(folder))
        module = _imported(_package_folder(Path(folder)))
        _import_kernels(module)
        for part in parts:
            importlib.import_module(f"{module.__name__}.{part}")
        return module


def _import_kernels(module: ModuleType) -> None:
    """Import the kernels of a package, which it does itself when it first meets a GPU, while its files are there."""
    if importlib.util.find_spec("triton") is not None and (Path(str(module.__file__)).parent / "kernels").is_dir():
        importlib.import_module(f"{module.__name__}.kernels")


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Write the files of `emit`, name → text, below `folder`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def hidden_states(output: Any) -> Any:
    """Return the tensor [B, S, D] of what a block, a backbone or an MTP step of a generated model returns.

    Where the spec has experts, that is the first of a pair, whose second holds the routers' statistics.
    """
    return output[0] if isinstance(output, tuple) else output


def _package_folder(folder: Path) -> Path:
    if (folder / "__init__.py").is_file():
        return folder
    found = sorted(path.parent for path in folder.glob("*/__init__.py"))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} holds {len(found)} packages, not one")
    return found[0]


def _imported(folder: Path) -> ModuleType:
    name = f"n3c_generated_{next(_numbers)}_{folder.name}"
    found = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # the parts of the package look it up
    try:
        found.loader.exec_module(module)
    except BaseException:
        for part in [part for part in sys.modules if part == name or part.startswith(f"{name}.")]:
            del sys.modules[part]
        raise
    return module
