"""Qwen2.5-VL as LongCat-Image's text encoder: the decoder layers only, at the official positions."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from . import prompts, quantised_state
from .checkpoints import Checkpoint, audit, build, shapes
from .component_files import Outlines
from .errors import LongCatError

# The published file, files saved by transformers 4.52 and later, and files of the bare language model.
_LANGUAGE_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_OTHER_PARTS = ("visual.", "model.visual.", "lm_head.")
_PAD_POSITION = 1
_SHORT = (torch.bfloat16, torch.float16)


class HostEmbedding(nn.Module):
    """The token embedding, on the CPU: of its 1.09 GB a prompt needs a few rows."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight  # no parameter, so that nothing moves it
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of token ids, on the device of the ids, in the dtype of the computation."""
        return functional.embedding(ids.cpu(), self.weight).to(ids.device, self.dtype)


class TextEncoder(nn.Module):
    """Prompt tokens to the 512 embeddings that condition the DiT."""

    def __init__(self, model: Qwen2_5_VLTextModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype  # of the embeddings; quantised layers would hide it
        self.prefix = tuple(prompts.token_ids(tokenizer, prompts.TEXT_TO_IMAGE_PREFIX))
        self.pad = int(tokenizer.pad_token_id)

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
        embeddings = self.embed((*self.prefix, *ids), device)
        positions = torch.arange(embeddings.shape[1]).expand(3, -1)
        hidden = self.hidden_states(embeddings, positions, prompts.MAX_TOKENS - len(ids))
        return hidden[:, len(self.prefix) :]

    def embed(self, tokens: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
        """Embeddings (1, tokens, hidden size) of token ids before the first layer."""
        embeddings: torch.Tensor = self.model.embed_tokens(torch.tensor([tokens], dtype=torch.long, device=device))
        return embeddings

    @torch.no_grad()
    def hidden_states(self, embeddings: torch.Tensor, positions: torch.Tensor, pads: int) -> torch.Tensor:
        """The last hidden states of a sequence, with ``pads`` pads after it, of which one is computed.

        Args:
            embeddings: (1, tokens, hidden size).
            positions: (3, tokens), in time, row and column.

        Returns:
            (1, tokens + pads, hidden size).
        """
        length, device = embeddings.shape[1], embeddings.device
        pad = [self.pad] * min(pads, 1)
        embeddings = torch.cat([embeddings, self.embed(pad, device)], dim=1)
        positions = torch.cat([positions, torch.full((3, len(pad)), _PAD_POSITION)], dim=1)
        mask = torch.ones(1, embeddings.shape[1], dtype=torch.long, device=device)
        mask[:, length:] = 0
        hidden = self.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions[:, None].to(device),
            use_cache=False,
        ).last_hidden_state
        return torch.cat([hidden[:, :length], hidden[:, length:].expand(-1, pads, -1)], dim=1)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, from its own files only; no code in it is run.

    Raises:
        LongCatError: its files are damaged, or it has no padding token.
    """
    with checkpoint.tokenizer_folder() as folder:
        tokenizer: PreTrainedTokenizerBase = build(
            "tokenizer",
            lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        )
    if tokenizer.pad_token_id is None:
        raise LongCatError(
            "The tokenizer has no padding token, so it is not LongCat-Image's. Download 'tokenizer' again.",
            "该分词器没有填充词元，不是 LongCat-Image 的分词器。请重新下载“tokenizer”。",
        )
    return tokenizer


def check_characters(prompt: str) -> None:
    """Refuse a prompt that cannot be written as UTF-8, which tokenizers need.

    Raises:
        LongCatError: it holds half of a surrogate pair.
    """
    half = re.search("[\ud800-\udfff]", prompt)
    if half:
        place, code = half.start() + 1, f"U+{ord(half.group()):04X}"
        raise LongCatError(
            f"Character {place} of the prompt is half of one ({code}): an emoji or a rare character was cut in "
            "two. Put the whole character there, or take the half away.",
            f"提示词的第 {place} 个字符只有一半（{code}）：某个表情符号或生僻字被截断。请补全该字符或将其删除。",
        )


def load_text_encoder(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    prepare: Callable[[nn.Module], None] = lambda model: None,
    convert: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda weights: weights,
    keep_stored: bool = False,
) -> TextEncoder:
    """Build the encoder from its own config and load only the decoder layers.

    Args:
        dtype: of the embeddings, and of the weights unless ``convert`` gives them others. Quantised weights in the
            checkpoint are taken as they are, with the dtype of its files.
        prepare: exchanges layers of the model while it has no weights yet.
        convert: the weights that the exchanged layers take.
        keep_stored: leave 16-bit weights as the files have them, for layers that widen them when they are used.

    Raises:
        LongCatError: see :func:`audited_shapes`; or the tokenizer has more tokens than the encoder.
    """
    rows = audited_shapes(checkpoint)["embed_tokens.weight"][0]
    if len(tokenizer) > rows:
        raise LongCatError(
            f"The tokenizer has {len(tokenizer)} tokens, but the text encoder knows {rows}: they are from different "
            "models. Download 'tokenizer' and 'text_encoder' of the same checkpoint.",
            f"分词器有 {len(tokenizer)} 个词元，而文本编码器只有 {rows} 个：两者来自不同的模型。"
            "请下载同一检查点的“tokenizer”和“text_encoder”。",
        )
    model = empty_text_model(checkpoint.configs["text_encoder"])
    stored = checkpoint.weights("text_encoder")
    outlines = checkpoint.packed("text_encoder")
    if outlines is not None:
        return _load_quantised(model, tokenizer, stored, outlines)
    prepare(model)
    kept = _SHORT if keep_stored else ()
    weights = {
        name: weight if weight.dtype in kept else weight.to(dtype)
        for name, weight in ((name, stored[key]) for name, key in language_keys(stored).items())
    }
    model.embed_tokens = HostEmbedding(weights.pop("embed_tokens.weight"), dtype)
    model.load_state_dict(convert(weights), assign=True)
    _compute_buffers(model, model.config)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer, dtype)


def _load_quantised(
    model: Qwen2_5_VLTextModel,
    tokenizer: PreTrainedTokenizerBase,
    stored: Mapping[str, torch.Tensor],
    outlines: Outlines,
) -> TextEncoder:
    weights = {name: stored[key] for name, key in language_keys(stored).items()}
    dtype = stored_dtype(outlines)
    model.embed_tokens = HostEmbedding(weights.pop("embed_tokens.weight"), dtype)
    quantised_state.load_quantised(model, "text_encoder", weights, outlines.packed, torch.device("cpu"))
    _compute_buffers(model, model.config)
    return TextEncoder(model.eval(), tokenizer, dtype)


def empty_text_model(config: Mapping[str, Any]) -> Qwen2_5_VLTextModel:
    """The decoder without storage, from the checkpoint's own config.

    Raises:
        LongCatError: no decoder can be built from the config.
    """

    def empty() -> Qwen2_5_VLTextModel:
        text_config = Qwen2_5_VLConfig.from_dict(dict(config)).text_config
        with torch.device("meta"):
            return Qwen2_5_VLTextModel(text_config)

    return build("text_encoder", empty)


def audited_shapes(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """The shapes of the decoder's weights, of quantised ones too, after the files were checked against its config.

    Raises:
        LongCatError: see :func:`empty_text_model`, :func:`component_files.read_outlines`, :func:`checkpoints.audit`
            and :func:`quantised_state.audit_quantised`.
    """
    model = empty_text_model(checkpoint.configs["text_encoder"])
    expected = shapes(model.state_dict())
    outlines = checkpoint.packed("text_encoder")
    if outlines is None:
        stored = checkpoint.shapes("text_encoder")
        audit("text_encoder", expected, {name: stored[key] for name, key in language_keys(stored).items()})
    else:
        held = {name: outlines.tensors[key] for name, key in language_keys(outlines.tensors).items()}
        quantised_state.audit_quantised(model, "text_encoder", held, outlines.packed)
    return expected


def stored_dtype(outlines: Outlines) -> torch.dtype:
    """The dtype of the decoder's weights that are not quantised in a file; its layers compute in it."""
    return outlines.tensors[language_keys(outlines.tensors)["norm.weight"]].dtype


def language_keys(keys: Iterable[str]) -> dict[str, str]:
    """The decoder's keys in the bare text model to those given; output head and vision tower are left out."""
    kept = [key for key in keys if not key.startswith(_OTHER_PARTS)]
    prefix = next((p for p in _LANGUAGE_PREFIXES if f"{p}embed_tokens.weight" in kept), "")
    return {key.removeprefix(prefix): key for key in kept}


def _compute_buffers(model: Qwen2_5_VLTextModel, config: Any) -> None:
    """Rotary frequencies are not saved in files; a model built on the meta device has none yet."""
    model.rotary_emb = type(model.rotary_emb)(config=config)
