"""ComfyUI's own LongCat text encoder, given the official tokens and the official picture of an edit.

Its own tokenizer reads an empty prompt as a blank and splits quotes in an order that differs between processes, and its
own resizing is not that of the official image processor; so neither is used here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sd
import comfy.text_encoders.longcat_image
import torch
from PIL import Image

from .. import editing, official, prompts
from ..vision import load_processor
from .clip import Tokenizer

_KEY = "qwen25_7b"
_RAW = {"do_rescale": False, "do_normalize": False}


def is_core(clip: comfy.sd.CLIP | None) -> bool:
    """Whether a CLIP is that of CLIPLoader with type longcat_image."""
    return clip is not None and isinstance(clip.tokenizer, comfy.text_encoders.longcat_image.LongCatImageTokenizer)


def tokenizer(clip: comfy.sd.CLIP) -> Tokenizer:
    """Prompts to the official tokens, with the vocabulary of ComfyUI's tokenizer."""
    return Tokenizer(getattr(clip.tokenizer, _KEY).tokenizer)


def pixels(picture: Image.Image) -> torch.Tensor:
    """A picture (1, height, width, 3) in 0..1 as the official image processor sizes it: multiples of 28.

    ComfyUI's encoder resizes to what it is already, and normalises by the same constants.
    """
    inputs = load_processor({**official.PROCESSOR, **_RAW})(images=[picture], return_tensors="pt")
    _, rows, columns = (int(side) for side in inputs["image_grid_thw"][0])
    merge, patch = int(official.PROCESSOR["merge_size"]), int(official.PROCESSOR["patch_size"])
    blocks = inputs["pixel_values"].reshape(rows // merge, columns // merge, merge, merge, 3, -1, patch, patch)
    still = blocks[:, :, :, :, :, 0]  # the processor repeats a picture in time
    return still.permute(0, 2, 5, 1, 3, 6, 4).reshape(1, rows * patch, columns * patch, 3).float() / 255


def encode(
    clip: comfy.sd.CLIP, ids: Sequence[int], pictures: Sequence[torch.Tensor], values: Mapping[str, Any]
) -> list[Any]:
    """CONDITIONING of one instruction for each picture, (pictures, 514 + picture tokens, hidden size).

    Args:
        ids: at most 512 tokens of the instruction.
        pictures: see :func:`pixels`.
        values: what the CONDITIONING holds beside the embeddings.
    """
    each = [
        clip.encode_from_tokens_scheduled(_tokens(clip, ids, picture), add_dict=dict(values)) for picture in pictures
    ]
    return [_joined(entries) for entries in zip(*each, strict=True)]


def _tokens(clip: comfy.sd.CLIP, ids: Sequence[int], picture: torch.Tensor) -> dict[str, Any]:
    own = getattr(clip.tokenizer, _KEY)
    before, after = editing.split_template(own.tokenizer)
    pads = [own.pad_token] * (prompts.MAX_TOKENS - len(ids))
    text = [*after, *ids, *pads, *prompts.token_ids(own.tokenizer, prompts.SUFFIX)]
    image = {"type": "image", "data": picture, "original_type": "image"}
    return {_KEY: [[(entry, 1.0) for entry in (*before, image, *text)]]}


def _joined(entries: Sequence[Any]) -> list[Any]:
    """One entry of a CONDITIONING for all pictures; LongCat's transformer masks no padding."""
    values = {key: value for key, value in entries[0][1].items() if key != "attention_mask"}
    return [torch.cat([embeddings for embeddings, _ in entries]), values]
