"""Other people's readers, run on what n3c writes (`make test-readers`): the same values, or what docs/readers.md says.

Every tensor of 18 checkpoints is compared with n3c's own decoded value, within what the reader's types cost.
"""

from __future__ import annotations

import os
import re

import pytest

from .comparison import Difference, compare
from .environment import READERS, ROOT, run
from .matrix import matrix
from .written import FORMATS, KINDS, Written, write

pytestmark = [pytest.mark.oracles, pytest.mark.timeout(3600)]

PAGE = ROOT / "docs" / "readers.md"
BEFORE, AFTER = "<!-- matrix: written by `N3C_UPDATE_GOLDEN=1 make test-readers` -->\n", "<!-- end of matrix -->\n"

Found = dict[tuple[str, str, str], Difference]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Written]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {(kind, name): write(kind, name, folder) for kind in KINDS for name in FORMATS}


@pytest.fixture(scope="module")
def found(written: dict[tuple[str, str], Written], tmp_path_factory: pytest.TempPathFactory) -> Found:
    differences: Found = {}
    folders = [checkpoint.folder for checkpoint in written.values()]
    for reader in READERS:
        out = tmp_path_factory.mktemp(reader.module)
        run(reader, folders, out)
        for (kind, name), checkpoint in written.items():
            read = out / checkpoint.folder.name
            differences[reader.title, kind, name] = compare(checkpoint.folder, read, reader.tolerance)
    return differences


def test_the_page_says_what_each_reader_makes_of_each_checkpoint(found: Found) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEFORE)
    _, _, after = rest.partition(AFTER)
    expected = f"{before}{BEFORE}\n{matrix(found)}\n{AFTER}{after}"
    if os.environ.get("N3C_UPDATE_GOLDEN"):
        PAGE.write_text(expected, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("title", ["vLLM", "compressed-tensors"])
def test_these_read_and_run_everything_as_it_is_stored(found: Found, title: str) -> None:
    assert [key for key, difference in found.items() if key[0] == title and not difference.clean] == []


@pytest.mark.parametrize("title", ["SGLang", "TensorRT Edge-LLM", "llama.cpp"])
def test_a_note_names_the_reader_exactly_where_it_runs_something_else(
    found: Found, written: dict[tuple[str, str], Written], title: str
) -> None:
    for (kind, name), checkpoint in written.items():
        told = title.removeprefix("TensorRT ") in checkpoint.notes()
        assert told == runs_something_else(found[title, kind, name], name), (kind, name)


def runs_something_else(difference: Difference, format_: str) -> bool:
    """Whether a choice of formats makes a reader differ: not what it lacks for BF16, nor FP8 weights as floats."""
    if format_ == "bf16":
        return False
    formats = {run for stored, run in difference.formats.values() if stored != "FP8"}
    elsewhere = (".input_scale", ".k_scale", ".v_scale", "_latent_proj.weight")
    missing = [name for name in difference.unread if not name.endswith(elsewhere)]
    return bool(difference.refused or difference.wrong or missing or formats or difference.unusable)


def test_edge_llm_exports_what_it_loads(found: Found) -> None:
    """It packs routed experts in NVFP4 and W4A16_NVFP4 alone, and gives NVFP4 ones an input_scale of 1."""
    for kind in KINDS:
        for name in FORMATS:
            loaded, exported = (found[f"TensorRT Edge-LLM{end}", kind, name] for end in ("", " to ONNX"))
            refused = any(not module.startswith("mtp.") for module in loaded.unusable)
            assert bool(exported.refused) == refused, (kind, name, exported.refused)
            assert all(re.search(r"experts\.\d+\.\w+\.input_scale$", tensor) for tensor in exported.wrong), (kind, name)
            if name in ("bf16", "fp8", "nvfp4"):  # others have weights in the order of Marlin's kernel
                assert [tensor for tensor in exported.unread if not tensor.startswith("mtp.")] == [], (kind, name)


def test_an_fp8_cache_is_announced_to_those_that_ask(found: Found) -> None:
    for kind in KINDS:
        for name in FORMATS:
            assert found["TensorRT Edge-LLM", kind, name].kv_cache == ("FP8" if name == "fp8-cache" else None)


def test_scales_of_an_fp8_cache_are_read(found: Found) -> None:
    for title in ("vLLM", "SGLang", "TensorRT Edge-LLM"):
        for kind in KINDS:
            difference = found[title, kind, "fp8-cache"]
            assert not [name for name in difference.unread if name.endswith(("k_scale", "v_scale"))]
