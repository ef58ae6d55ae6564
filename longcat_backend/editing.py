"""Editing: the sizes of a picture, the instruction around it, and the positions of a prompt that holds one.

Source: ``LongCatImageEditPipeline`` in diffusers; positions: ``get_rope_index`` in transformers 4.57.1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from . import latents, prompts
from .errors import LongCatError
from .text_encoder import TextEncoder
from .vision import PictureTokens

TARGET_AREA = 1024 * 1024
IMAGE_TOKEN = "<|image_pad|>"
PREFIX = (
    "<|im_start|>system\nAs an image editing expert, first analyze the content and attributes of the input image(s). "
    "Then, based on the user's editing instructions, clearly and precisely determine how to modify the given "
    "image(s), ensuring that only the specified parts are altered and all other aspects remain consistent with the "
    f"original(s).<|im_end|>\n<|im_start|>user\n<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
)


@dataclass(frozen=True)
class EditInput:
    """What stands around an instruction: the template's tokens before and after the picture, and the picture."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    picture: PictureTokens


def canvas_size(width: int, height: int, area: int = TARGET_AREA) -> tuple[int, int]:
    """Width and height of the canvas and the reference for a picture: its ratio at ``area``, rounded up to 16.

    Raises:
        LongCatError: the picture is so long that a side would exceed 4096.
    """
    ratio = width / height
    wide = math.sqrt(area * ratio)
    size = _on_grid(wide), _on_grid(wide / ratio)
    if max(size) > latents.LARGEST_SIDE:
        raise LongCatError(
            f"The picture is {width}x{height}: at one megapixel it would be {size[0]}x{size[1]}, and {max(size)} is "
            f"over the limit of {latents.LARGEST_SIDE}. Crop it, or set size to custom.",
            f"图像为 {width}x{height}，按一百万像素会变为 {size[0]}x{size[1]}，{max(size)} 超过上限 "
            f"{latents.LARGEST_SIDE}。请裁剪图像，或把 size 设为 custom。",
        )
    return size


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture stretched to a size in pixels, as diffusers' image processor does it."""
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def split_template(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The template's tokens before and after the picture.

    Raises:
        LongCatError: the tokenizer has no token for pictures.
    """
    image = image_token(tokenizer)
    tokens = tuple(prompts.token_ids(tokenizer, PREFIX))
    if tokens.count(image) != 1:
        raise LongCatError(
            f"The tokenizer does not know {IMAGE_TOKEN}, so it is not LongCat-Image's. Download 'tokenizer' again.",
            f"该分词器没有词元 {IMAGE_TOKEN}，不是 LongCat-Image 的分词器。请重新下载“tokenizer”。",
        )
    place = tokens.index(image)
    return tokens[:place], tokens[place + 1 :]


def image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token in whose place a picture's embeddings go."""
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return token if isinstance(token, int) else -1


def check_instruction(ids: Sequence[int], image: int) -> None:
    """Refuse a prompt that writes the picture's own token; the official pipeline fails on it too.

    Args:
        image: see :func:`image_token`.

    Raises:
        LongCatError: the token is in the prompt.
    """
    if image in ids:
        raise LongCatError(
            f"The prompt contains {IMAGE_TOKEN}, which stands for a picture. Take it out: LongCatEditEncode puts the "
            "picture in its place by itself.",
            f"提示词中含有代表图像的 {IMAGE_TOKEN}。请将其删除：LongCatEditEncode 会自动放入图像。",
        )


def positions(before: int, rows: int, columns: int, after: int) -> torch.Tensor:
    """Positions (3, tokens) of text, a picture of ``rows`` by ``columns`` tokens, and text: time, row, column.

    The picture counts on from the text in each direction, and the text after it from its longer side.
    """
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = (axis.flatten() for axis in grid)
    picture = torch.stack([torch.zeros_like(row), row, column]) + before
    end = before + max(rows, columns)
    return torch.cat([torch.arange(before).expand(3, -1), picture, torch.arange(end, end + after).expand(3, -1)], dim=1)


def encode(
    encoder: TextEncoder, ids: Sequence[int], given: EditInput, device: torch.device | None = None
) -> torch.Tensor:
    """Embeddings of one instruction for one picture.

    Args:
        ids: at most 512 tokens of the instruction, see :func:`prompts.tokenize`.

    Returns:
        (1, 514 + picture tokens, hidden size): from the mark before the picture to the last pad.
    """
    text = (*given.after, *ids)
    opening, instruction = encoder.embed(given.before, device), encoder.embed(text, device)
    embeddings = torch.cat([opening, given.picture.features[None].to(opening), instruction], dim=1)
    places = positions(len(given.before), given.picture.rows, given.picture.columns, len(text))
    hidden = encoder.hidden_states(embeddings, places, prompts.MAX_TOKENS - len(ids))
    return hidden[:, len(given.before) - 1 :]


def _on_grid(side: float) -> int:
    return math.ceil(side / latents.GRID) * latents.GRID
