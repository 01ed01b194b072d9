"""llama.cpp's `convert_hf_to_gguf.py`, its classes as the script calls them, and the GGUF file read again.

See `reading.py` for how this is run and what it writes. Replaced: the vocabulary, as these checkpoints have no
tokenizer. Nothing of llama.cpp is compiled; the converter and gguf are Python.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reading import SCALES_OF_WEIGHTS, Reading, main, tensors_of


def read(folder: Path) -> Reading:
    """Return what a GGUF file of the checkpoint holds, unquantized tensors in float32."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        out = Path(place) / "model.gguf"
        hparams = ModelBase.load_hparams(folder, False)
        model_class: Any = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        model = model_class(folder, gguf.LlamaFileType.ALL_F32, out)
        model.set_vocab = lambda: None
        model.write()
        return decoded(model, gguf.GGUFReader(out), tensors_of(folder))


def decoded(model: Any, file: Any, tensors: dict[str, Tensor]) -> Reading:
    """Return the values of a GGUF file under the names of the checkpoint."""
    import gguf

    reading = Reading()
    held = {tensor.name: tensor for tensor in file.tensors}
    weight_only = no_4_bit_activations(file)
    for name in tensors:
        if name.endswith(SCALES_OF_WEIGHTS):
            continue
        place, expert = gguf_name(model, name)
        found = held.get(place)
        if found is None:
            continue
        value = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        value = value if expert is None else value[expert]
        if found.tensor_type == gguf.GGMLQuantizationType.NVFP4:
            scale = held.get(place.replace(".weight", ".scale"))
            value = value if scale is None else value * float(scale.data[expert or 0])
            reading.formats[name.removesuffix(".weight")] = "W4A16_NVFP4" if place in weight_only else "NVFP4"
        if name.endswith("A_log"):
            value = (-value).log()
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            value = as_stored(value, model.head_dim)
        reading.values[name] = value
    for name in reading.formats:
        place, expert = gguf_name(model, f"{name}.weight")
        scale = held.get(place.replace(".weight", ".input_scale"))
        if scale is not None:
            reading.values[f"{name}.input_scale"] = torch.tensor(float(scale.data[expert or 0]))
    return reading


def as_stored(weight: Tensor, head_dim: int) -> Tensor:
    """Return q or k [N, K] with the rows of each head in the order of the checkpoint.

    The converter brings them into the order of its rotary embedding, which this architecture does not have: as q and
    k are reordered alike, their products are the same.
    """
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def no_4_bit_activations(file: Any) -> set[str]:
    """Return the tensors whose activations the file says must not be rounded to 4 bits."""
    from gguf import Keys

    names, allowed = (
        file.fields.get(key) for key in (Keys.General.TENSOR_EXTRA_NAME, Keys.General.TENSOR_EXTRA_PREC_A4)
    )
    if names is None:
        return set()
    return {name for name, yes in zip(names.contents(), allowed.contents(), strict=True) if not yes}


def gguf_name(model: Any, name: str) -> tuple[str, int | None]:
    """Return the GGUF tensor of a checkpoint's tensor, as the converter itself maps names, and which expert in it."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace("dt_bias", "dt.bias")
    if model._mtp_bid is not None and name.startswith("mtp.layers."):
        renamed = model._MTP_SPECIAL_RENAMES.get(name)
        suffix = name.split(".", 3)[3]
        name = renamed.format(bid=model._mtp_bid) if renamed else f"backbone.layers.{model._mtp_bid}.{suffix}"
    expert = re.fullmatch(r"backbone\.layers\.(\d+)\.mixer\.experts\.(\d+)\.(\w+)\.weight", name)
    if expert:
        name = f"model.layers.{expert[1]}.mlp.experts.{expert[3]}.weight"
    try:
        return model.map_tensor_name(name), int(expert[2]) if expert else None
    except ValueError:  # the converter has no place for it
        return "", None


if __name__ == "__main__":
    main("of llama-cpp-python 0.3.36", read)
