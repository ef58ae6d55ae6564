"""Instructions and pictures to what the edit DiT is conditioned on, exactly as the official pipeline does, in batches.

The vision tower and the language model of transformers take one picture after the other and ask the host for sizes;
here all pictures have the same 64 x 64 px, so a batch of them stays on the device. Text positions are those of
transformers 4.57.1: pads stand at position 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import LongCatImageEditPipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import prepare_pos_ids
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from tests.scoring.scenes import IMAGE_SIZE
from tools.tiny.conditioning import PAD_POSITION, TEXT_SLOTS, TokenRows

HALF = IMAGE_SIZE // 2  # the vision encoder sees the picture at half its size, here rounded to 56 px by the processor
GRID = 2  # merged vision tokens a side
PICTURE_TOKENS = GRID**2
AROUND = PICTURE_TOKENS + 2  # the DiT also sees the marks before and after the picture
IMAGE_TOKEN = "<|image_pad|>"


def tokenize_instructions(pipeline: LongCatImageEditPipeline, instructions: Sequence[str], width: int = 0) -> TokenRows:
    """Token rows of instructions without quotes; `prefix` counts what the DiT doesn't see: all before the mark.

    They are padded to the longest and one pad more, or to `width` tokens of instruction and pads. Raises ValueError
    when an instruction and its pad don't fit `width`.
    """
    template = pipeline.prompt_template_encode_prefix.replace(IMAGE_TOKEN, IMAGE_TOKEN * PICTURE_TOKENS)
    before = pipeline.tokenizer(template, add_special_tokens=False)["input_ids"]
    rows = [pipeline.tokenizer(text, add_special_tokens=False)["input_ids"] for text in instructions]
    longest = max(map(len, rows))
    width = width or longest + 1
    if longest >= width:
        raise ValueError(f"expected instructions under {width} tokens, found one of {longest}: raise the width")
    pad = pipeline.tokenizer.pad_token_id
    padded = [before + ids + [pad] * (width - len(ids)) for ids in rows]
    lengths = [len(before) + len(ids) for ids in rows]
    return TokenRows(torch.tensor(padded), torch.tensor(lengths), len(before) - AROUND)


def picture_patches(processor: Any, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """What the vision encoder sees of pictures uint8 (128, 128, 3): patches (N, 16, 3 * 14 * 14) uint8.

    The processor normalises the levels that it resized, and shows every one twice (as two frames); both are undone
    here and done again by `PictureEncoder`, to hold a twelfth of the bytes.
    """
    halves = [Image.fromarray(picture).resize((HALF, HALF), Image.Resampling.LANCZOS) for picture in pictures]
    values = processor(images=halves, return_tensors="pt")["pixel_values"].unflatten(0, (len(pictures), -1))
    values = values.unflatten(-1, (3, processor.temporal_patch_size, -1))[:, :, :, 0]
    mean, std = (torch.tensor(v)[:, None] for v in (processor.image_mean, processor.image_std))
    return ((values * std + mean) * 255).round().to(torch.uint8).flatten(2)


class PictureEncoder:
    """The vision tower on a batch of pictures of one size; it shares the tower's weights."""

    def __init__(self, pipeline: LongCatImageEditPipeline) -> None:
        processor, self.tower = pipeline.image_processor_vl, pipeline.text_encoder.model.visual
        weight = self.tower.patch_embed.proj.weight
        self.frames = processor.temporal_patch_size
        self.mean, self.std = (
            torch.tensor(v, device=weight.device)[:, None, None] for v in (processor.image_mean, processor.image_std)
        )
        self.rotary = self._rotary(weight)

    def _rotary(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's own rotary table (16, head size) of one picture, as its first block gets it."""
        seen: dict[str, Any] = {}
        hook = self.tower.blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        side = GRID * self.tower.spatial_merge_size
        with torch.no_grad():
            patches = weight.new_zeros(side**2, weight[0].numel())
            self.tower(patches, grid_thw=torch.tensor([[1, side, side]], device=weight.device))
        hook.remove()
        cos, sin = seen["position_embeddings"]
        return cos.clone(), sin.clone()

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, 4, hidden) of patches (B, 16, 3 * 14 * 14) uint8."""
        values = (patches.unflatten(-1, (3, 1, -1)).float() / 255 - self.mean) / self.std
        values = values.expand(-1, -1, -1, self.frames, -1).flatten(2)
        hidden = F.linear(values, self.tower.patch_embed.proj.weight.flatten(1))
        for block in self.tower.blocks:
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
        return self.tower.merger(hidden.flatten(0, 1)).unflatten(0, (len(patches), PICTURE_TOKENS))

    def _attend(self, attention: Any, hidden: torch.Tensor) -> torch.Tensor:
        batch, count, _ = hidden.shape
        states = attention.qkv(hidden).reshape(batch * count, 3, attention.num_heads, -1).unbind(1)
        cos, sin = (table.repeat(batch, 1) for table in self.rotary)
        query, key = apply_rotary_pos_emb_vision(states[0], states[1], cos, sin)
        heads = (t.unflatten(0, (batch, count)).transpose(1, 2) for t in (query, key, states[2]))
        return attention.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def _positions(first: int, width: int, device: torch.device) -> torch.Tensor:
    """Positions (3, width) in time, row and column of a text whose token `first` starts a picture's tokens."""
    index = torch.arange(width, device=device)
    inside = index - first
    picture = torch.stack([inside * 0, inside // GRID, inside % GRID]) + first
    rest = torch.where(inside < 0, index, index - PICTURE_TOKENS + GRID)
    return torch.where((inside >= 0) & (inside < PICTURE_TOKENS), picture, rest)


def encode_instructions(
    text_encoder: Qwen2_5_VLForConditionalGeneration, rows: TokenRows, pictures: torch.Tensor, slots: int
) -> torch.Tensor:
    """Conditioning (B, 6 + slots, hidden) of token rows with their pictures' embeddings (B, 4, hidden)."""
    model, width, first = text_encoder.model.language_model, rows.ids.shape[1], rows.prefix + 1
    index = torch.arange(width, device=rows.ids.device)
    real = index < rows.lengths[:, None]
    positions = torch.where(real, _positions(first, width, rows.ids.device)[:, None], PAD_POSITION)
    mask = (index[None, :] <= index[:, None]) & real[:, None, None, :]
    words = model.embed_tokens(rows.ids)
    hidden = model(
        inputs_embeds=torch.cat([words[:, :first], pictures, words[:, first + PICTURE_TOKENS :]], dim=1),
        attention_mask={"full_attention": mask},
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, rows.prefix :]
    return torch.cat([hidden, hidden[:, -1:].expand(-1, AROUND + slots - hidden.shape[1], -1)], dim=1)


def edit_position_ids(slots: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Text ids (6 + slots, 3), and ids (2 * side * side, 3) of the canvas and then the reference.

    Both pictures start at 518, the conditioning's length with 512 slots, whatever `slots` is.
    """
    start = AROUND + TEXT_SLOTS
    text = prepare_pos_ids(0, "text", num_token=AROUND + slots)
    images = [prepare_pos_ids(m, "image", start=(start, start), height=side, width=side) for m in (1, 2)]
    return text.to(device), torch.cat(images).to(device)
