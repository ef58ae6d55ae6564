"""Qwen2.5-VL as LongCat-Image's text encoder: the decoder layers only, at the official positions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from . import prompts
from .checkpoints import Checkpoint, audit

# The published file, files saved by transformers 4.52 and later, and files of the bare language model.
_LANGUAGE_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_OTHER_PARTS = ("visual.", "model.visual.", "lm_head.")
_PAD_POSITION = 1


class TextEncoder(nn.Module):
    """Prompt tokens to the 512 embeddings that condition the DiT."""

    def __init__(self, model: Qwen2_5_VLTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.prefix = tuple(prompts.token_ids(tokenizer, prompts.TEXT_TO_IMAGE_PREFIX))
        self.pad = int(tokenizer.pad_token_id)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the embeddings."""
        return self.model.dtype

    @torch.no_grad()
    def encode(self, ids: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
        """Embeddings of one prompt.

        The DiT attends to all 512 slots, so padding is part of the picture. transformers 4.57.1, with which
        the model was published, puts every pad at position 1; since pads are never attended to, all of them
        get one embedding, which is computed once and repeated. The template's suffix comes after the
        prompt and cannot influence it (causal attention), so it is not computed at all.

        Args:
            ids: at most 512 prompt tokens, see :func:`prompts.tokenize`.

        Returns:
            (1, 512, hidden size), the last hidden state after the final norm.
        """
        pads = prompts.MAX_TOKENS - len(ids)
        tokens = [*self.prefix, *ids] + [self.pad] * min(pads, 1)
        length = len(self.prefix) + len(ids)
        device = device or self.model.device
        mask = torch.ones(1, len(tokens), dtype=torch.long, device=device)
        mask[:, length:] = 0
        positions = torch.arange(len(tokens), device=device)
        positions[length:] = _PAD_POSITION
        hidden = self.model(
            input_ids=torch.tensor([tokens], device=device),
            attention_mask=mask,
            position_ids=positions.expand(3, 1, -1),
            use_cache=False,
        ).last_hidden_state
        text = hidden[:, len(self.prefix) : length]
        return torch.cat([text, hidden[:, length:].expand(-1, pads, -1)], dim=1)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of an official checkpoint folder, from its own files only."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        checkpoint.folder / "tokenizer", local_files_only=True
    )
    return tokenizer


def load_text_encoder(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> TextEncoder:
    """Build the encoder from its own config and load only the decoder layers.

    Raises:
        LongCatError: see :func:`checkpoints.read_weights` and :func:`checkpoints.audit`.
    """
    config = Qwen2_5_VLConfig.from_dict(dict(checkpoint.configs["text_encoder"])).text_config
    with torch.device("meta"):
        model = Qwen2_5_VLTextModel(config)
    weights = language_weights(checkpoint.weights("text_encoder"))
    audit("text_encoder", {key: value.shape for key, value in model.state_dict().items()}, weights)
    model.load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    _compute_buffers(model, config)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer)


def language_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder's tensors under the names of the bare text model; the output head and vision tower are left out."""
    kept = {key: value for key, value in weights.items() if not key.startswith(_OTHER_PARTS)}
    prefix = next((p for p in _LANGUAGE_PREFIXES if f"{p}embed_tokens.weight" in kept), "")
    return {key.removeprefix(prefix): value for key, value in kept.items()}


def _compute_buffers(model: Qwen2_5_VLTextModel, config: Any) -> None:
    """Rotary frequencies are not saved in files; a model built on the meta device has none yet."""
    model.rotary_emb = type(model.rotary_emb)(config=config)
