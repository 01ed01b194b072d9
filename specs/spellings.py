"""The names of tensors and modules in released checkpoints, from those that other programs give them.

backbone.layers.0.mixer.…       released; the others are renamed to it
model.layers.0.mixer.…          transformers, in memory
model.backbone.layers.0.…       a module that holds the model as `model`
backbone.embedding.weight       transformers 5.3 to 5.15
module.…, _orig_mod.…           DistributedDataParallel, torch.compile
language_model.…                the text model of multimodal checkpoints
"""

from __future__ import annotations

WRAPPERS = ("module.", "_orig_mod.")
LANGUAGE_MODEL = ("model.language_model.", "language_model.model.", "language_model.")
_OF_TEXT = ("backbone.", "model.", "mtp.", "lm_head")
_OF_TRUNK = ("layers", "embedding", "norm_f", "*")
"""What follows `model.`; of other things with that prefix the name is left."""


def released_name(name: str) -> str:
    """Return the name that a released checkpoint has for a tensor or a module; unknown names are left as they are."""
    name = _unwrapped(name).replace("._orig_mod.", ".")
    for prefix in LANGUAGE_MODEL:
        inner = name.removeprefix(prefix)
        if inner != name:
            name = inner if inner.startswith(_OF_TEXT) else f"backbone.{inner}"
            break
    inner = name.removeprefix("model.")
    if inner != name and inner.startswith(_OF_TEXT):
        name = inner
    elif inner != name and inner.startswith(_OF_TRUNK):
        name = f"backbone.{inner}"
    root, _, rest = name.partition(".")
    if root == "backbone" and (rest == "embedding" or rest.startswith("embedding.")):
        name = f"backbone.embeddings{rest.removeprefix('embedding')}"
    return name


def is_nested(name: str) -> bool:
    """Whether a tensor is that of a text model beside others."""
    return _unwrapped(name).startswith(LANGUAGE_MODEL)


def is_text(name: str) -> bool:
    """Whether a tensor of a multimodal checkpoint is that of its text model."""
    return _unwrapped(name).startswith((*LANGUAGE_MODEL, "backbone.", "mtp.", "lm_head."))


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
