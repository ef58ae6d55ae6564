"""The text encoder as a ComfyUI CLIP."""

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import editing, prompt_care, prompts, quantisation
from ..checkpoints import Checkpoint
from ..editing import EditInput
from ..errors import LongCatError
from ..precision import Preset
from ..text_encoder import TextEncoder, check_characters, load_text_encoder, load_tokenizer
from . import formats, host, kitchen, patchers
from .castable import castable, replace_linears

# The key under which ComfyUI's own LongCat encoder hands over its tokens.
_KEY = "qwen25_7b"
_PICTURES = "longcat_pictures"
_COMPONENT = "text_encoder"

logger = logging.getLogger(__name__)


class Tokenizer:
    """Prompts to tokens for :class:`comfy.sd.CLIP`; prompt weights such as (word:1.2) are no part of LongCat."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def inspect(self, text: str) -> prompts.PromptTokens:
        """Tokens of a prompt with what happened on the way.

        Raises:
            LongCatError: see :func:`text_encoder.check_characters`.
        """
        check_characters(text)
        return prompts.tokenize(self.tokenizer, text)

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **kwargs: Any
    ) -> dict[str, list[list[tuple[int, float]]]]:
        """Tokens of a prompt in ComfyUI's shape: every weight is 1.

        Raises:
            LongCatError: there are pictures, which would be left out without a word.
        """
        if kwargs.get("images"):
            raise LongCatError(
                "This node's way to encode a picture is not LongCat's. Use LongCatEditEncode in its place.",
                "该节点编码图像的方式与 LongCat 不同。请改用 LongCatEditEncode。",
            )
        return {_KEY: [_weighted(self.inspect(text).ids)]}

    def decode(self, ids: Any, **kwargs: Any) -> str:
        """Text of token ids."""
        text: str = self.tokenizer.decode(ids, **kwargs)
        return text

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing: the tokenizer is no part of saved weights."""
        return {}


class EncoderModel(nn.Module):
    """What :class:`comfy.sd.CLIP` asks of its model."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtypes = {encoder.dtype}
        self.device: torch.device | None = None
        self.vision: Any = None  # of :mod:`editing`, for the first picture; outside of this model's memory
        self.head_patcher: Any = None  # of :mod:`rewriting`, for the first text that is written; outside of it too

    def reset_clip_options(self) -> None:
        """Forget the device of the last run."""
        self.device = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """Take the device to run on; LongCat always uses the last layer."""
        self.device = options.get("execution_device", self.device)

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[torch.Tensor, None]:
        """Embeddings (prompts, 512 and more with a picture, hidden size) and no pooled output."""
        prompts_ids = [[token for token, _ in pairs] for pairs in tokens[_KEY]]
        pictures = tokens.get(_PICTURES) or [None] * len(prompts_ids)
        embeddings = torch.cat([self._encode(ids, picture) for ids, picture in zip(prompts_ids, pictures, strict=True)])
        return embeddings.float().to(comfy.model_management.intermediate_device()), None

    def _encode(self, ids: Sequence[int], picture: EditInput | None) -> torch.Tensor:
        if picture is None:
            return self.encoder.encode(ids, self.device)
        return editing.encode(self.encoder, ids, picture, self.device)


def edit_tokens(ids: Sequence[int], pictures: Sequence[EditInput]) -> dict[str, Any]:
    """Tokens of one instruction for each of some pictures, for :meth:`comfy.sd.CLIP.encode_from_tokens_scheduled`."""
    return {_KEY: [_weighted(ids) for _ in pictures], _PICTURES: list(pictures)}


def _weighted(ids: Sequence[int]) -> list[tuple[int, float]]:
    return [(token, 1.0) for token in ids]


def load(checkpoint: Checkpoint, dtype: torch.dtype, preset: Preset, keep_stored: bool = False) -> comfy.sd.CLIP:
    """The checkpoint's text encoder and tokenizer as a CLIP.

    Args:
        dtype: of the computation, and of every weight that is not quantised.
        keep_stored: see :func:`text_encoder.load_text_encoder`.

    Raises:
        LongCatError: see :func:`text_encoder.load_text_encoder`, :mod:`kitchen` and :func:`quantisation.quantise`.
    """
    tokenizer = load_tokenizer(checkpoint)
    model = EncoderModel(_load_encoder(checkpoint, tokenizer, dtype, preset, keep_stored))
    target = comfy.supported_models_base.ClipTarget(tokenizer=lambda **_: Tokenizer(tokenizer), clip=lambda **_: model)
    # No initial device: ComfyUI would load the model with a patcher that is exchanged in the next lines.
    clip = comfy.sd.CLIP(target, model_options={"dtype": dtype, "initial_device": None}, disable_dynamic=True)
    make = patchers.whole_patcher if preset.backend == "quanto" else patchers.castable_patcher
    clip.patcher = patchers.like(clip.patcher, make)
    formats.attach_source(clip.patcher, checkpoint)
    return clip


def _load_encoder(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, preset: Preset, keep_stored: bool
) -> TextEncoder:
    if preset.backend == "quanto":
        with torch.inference_mode(False):  # whose tensors could not be packed
            encoder = load_text_encoder(checkpoint, tokenizer, dtype)
        if checkpoint.packed(_COMPONENT) is None:  # else it holds the layers as they are wanted
            device = comfy.model_management.text_encoder_device()
            quantisation.quantise(encoder.model, _COMPONENT, preset, device, host.progress())
        return encoder
    packed = preset.backend == "kitchen"
    layers = kitchen.operations(dtype, preset, weight_only=True) if packed else comfy.ops.manual_cast

    def prepare(model: nn.Module) -> None:
        replace_linears(model, lambda name, layer: castable(layers, layer, dtype))

    def convert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored = checkpoint.quantised(_COMPONENT, preset.format)
        return kitchen.quantise(weights, _COMPONENT, preset, dtype, stored) if packed else weights

    encoder = load_text_encoder(checkpoint, tokenizer, dtype, prepare, convert, keep_stored)
    if packed:
        kitchen.verify(encoder.model, _COMPONENT, preset)
    return encoder


def encode(clip: comfy.sd.CLIP | None, prompt: str, normalise_quotes: bool = False) -> tuple[list[Any], str]:
    """CONDITIONING of a prompt and the report of what was encoded; what needs care is logged too.

    Args:
        normalise_quotes: encode the prompt with all quotes of the kind that the model was trained on.

    Raises:
        LongCatError: see :func:`require_longcat`.
    """
    clip = require_longcat(clip, "LongCatTextEncode")
    warn_other_flavour(clip.patcher, "LongCatTextEncode", edits=False)
    tokens, report = inspect(clip.tokenizer, "LongCatTextEncode", prompt, normalise_quotes)
    conditioning: list[Any] = clip.encode_from_tokens_scheduled({_KEY: [_weighted(tokens.ids)]})
    return conditioning, report


def inspect(
    tokenizer: Tokenizer, node: str, prompt: str, normalise_quotes: bool = False
) -> tuple[prompts.PromptTokens, str]:
    """Tokens of a prompt and the report of what was encoded; what needs care is logged too.

    Args:
        normalise_quotes: take the prompt with all quotes of the kind that the model was trained on.

    Raises:
        LongCatError: see :func:`text_encoder.check_characters`.
    """
    care = prompt_care.inspect(prompt)
    notes = []
    if normalise_quotes and care.foreign:
        prompt = care.normalised
        notes.append(f"quotes normalised, encoded prompt 引号已替换，实际编码的提示词: {prompt}")
        care = prompt_care.inspect(prompt)
    tokens = tokenizer.inspect(prompt)
    for warning in [*care.warnings(), *([tokens.cut_report()] if tokens.cut else [])]:
        logger.warning("%s: %s", node, warning)
    return tokens, tokens.report([*notes, *care.warnings()])


def require_longcat(clip: comfy.sd.CLIP | None, node: str) -> comfy.sd.CLIP:
    """The CLIP, if it is LongCatLoader's.

    Raises:
        LongCatError: it is not, so neither its positions nor its tokens are LongCat's.
    """
    if clip is not None and isinstance(clip.tokenizer, Tokenizer):
        return clip
    found = "nothing" if clip is None else type(clip.tokenizer).__name__
    en, zh = _INSTEAD.get(node, ("", ""))
    raise LongCatError(
        f"{node} needs the CLIP of LongCatLoader, but got one with {found}. Connect LongCatLoader{en}.",
        f"{node} 需要 LongCatLoader 的 CLIP，但接入的是 {found}。请连接 LongCatLoader{zh}。",
    )


_INSTEAD = {
    "LongCatTextEncode": (", or use CLIPTextEncode with that CLIP", "，或对该 CLIP 使用 CLIPTextEncode"),
    "LongCatEditEncode": (", or CLIPLoader with type longcat_image", "，或类型为 longcat_image 的 CLIPLoader"),
    "LongCatPromptRewrite": (", or choose endpoint as the source", "，或把来源设为 endpoint"),
}


def warn_other_flavour(patcher: comfy.model_patcher.ModelPatcher, node: str, edits: bool) -> None:
    """Log a warning if the checkpoint of a MODEL or CLIP is for the other task: editing, or text to image."""
    checkpoint = formats.source(patcher)
    if checkpoint is not None and checkpoint.flavour.edits != edits:
        en, zh = _OTHER_FLAVOUR[edits]
        key = checkpoint.flavour.key
        logger.warning("%s: the checkpoint is LongCat-Image %s, %s 该检查点为 %s，%s", node, key, en, key, zh)


_OTHER_FLAVOUR = {
    True: (
        "which draws from text and has not learnt to edit; use LongCat-Image-Edit.",
        "用于文生图，没有学过编辑；请使用 LongCat-Image-Edit。",
    ),
    False: ("which edits a given picture; use LongCatEditEncode.", "用于编辑给定的图像；请使用 LongCatEditEncode。"),
}
