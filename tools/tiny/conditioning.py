"""Captions to token rows, and token rows to what the DiT is conditioned on, exactly as the official pipeline does.

Text positions inside Qwen are those of transformers 4.57.1: pads stand at position 1. Every pad of a prompt then has
the same embedding, so one pad is encoded and repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import LongCatImagePipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids, split_quotation
from transformers import Qwen2_5_VLForConditionalGeneration

TEXT_SLOTS = 512
PAD_POSITION = 1


@dataclass
class TokenRows:
    """Right-padded rows: template prefix, prompt and at least one pad. `lengths` counts all but the pads."""

    ids: torch.Tensor  # (N, T) int64
    lengths: torch.Tensor  # (N,) int64
    prefix: int

    def take(self, index: torch.Tensor) -> TokenRows:
        """The rows at `index` (B,)."""
        return TokenRows(self.ids[index], self.lengths[index], self.prefix)

    def to(self, device: torch.device) -> TokenRows:
        """The same rows on `device`."""
        return TokenRows(self.ids.to(device), self.lengths.to(device), self.prefix)


def tokenize(pipeline: LongCatImagePipeline, prompts: Sequence[str], width: int = 0) -> TokenRows:
    """Token rows of `prompts`, padded to the longest and one pad more, or to `width` tokens of prompt and pads.

    Raises ValueError when a prompt and its pad don't fit `width`.
    """
    prefix = pipeline.tokenizer(pipeline.prompt_template_encode_prefix, add_special_tokens=False)["input_ids"]
    split = [
        [piece for part, quoted in split_quotation(prompt) for piece in (part if quoted else [part])]
        for prompt in prompts
    ]
    pieces = list(dict.fromkeys(piece for parts in split for piece in parts))
    tokens = pipeline.tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []
    known = dict(zip(pieces, tokens, strict=True))
    rows = [[token for piece in parts for token in known[piece]] for parts in split]
    longest = max(map(len, rows))
    width = width or longest + 1
    if longest >= width:
        raise ValueError(f"expected prompts under {width} tokens, found one of {longest}: raise the width")
    pad = pipeline.tokenizer.pad_token_id
    padded = [prefix + ids + [pad] * (width - len(ids)) for ids in rows]
    lengths = [len(prefix) + len(ids) for ids in rows]
    return TokenRows(torch.tensor(padded), torch.tensor(lengths), len(prefix))


def encode(text_encoder: Qwen2_5_VLForConditionalGeneration, rows: TokenRows, slots: int) -> torch.Tensor:
    """Conditioning (B, slots, hidden) of token rows: the prompt's embeddings, then its pad's, repeated."""
    width = rows.ids.shape[1]
    index = torch.arange(width, device=rows.ids.device)
    real = index < rows.lengths[:, None]
    positions = torch.where(real, index, PAD_POSITION).expand(3, -1, -1)
    mask = (index[None, :] <= index[:, None]) & real[:, None, None, :]
    hidden = text_encoder.model.language_model(
        inputs_embeds=text_encoder.model.language_model.embed_tokens(rows.ids),
        attention_mask={"full_attention": mask},
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, rows.prefix :]
    return torch.cat([hidden, hidden[:, -1:].expand(-1, slots - hidden.shape[1], -1)], dim=1)


def position_ids(slots: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Text ids (slots, 3) and image ids (side * side, 3); image ids start at 512 whatever `slots` is."""
    text = prepare_pos_ids(0, "text", num_token=slots)
    image = prepare_pos_ids(1, "image", start=(TEXT_SLOTS, TEXT_SLOTS), height=side, width=side)
    return text.to(device), image.to(device)
