"""Prompt rewriting with what is loaded, or by an endpoint on the network."""

import logging
import os
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from torch import nn

from .. import rewrite_endpoint, rewriting
from ..checkpoints import Checkpoint
from ..errors import LongCatError
from ..rewrite_endpoint import Endpoint
from ..rewriting import Rewrite, Sampling
from . import formats, host, patchers
from .castable import castable
from .clip import require_longcat

KEY_VARIABLE, URL_VARIABLE = "LONGCAT_REWRITE_API_KEY", "LONGCAT_REWRITE_API_URL"

logger = logging.getLogger(__name__)


class _Head(nn.Module):
    """The output head, managed by a patcher of its own, so that encoding never needs it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        with torch.device("meta"):
            plain = nn.Linear(columns, rows, bias=False)
        self.linear = castable(comfy.ops.manual_cast, plain, weight.dtype)
        self.linear.load_state_dict({"weight": weight}, assign=True)
        self.requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens) of hidden states (batch, hidden size)."""
        logits: torch.Tensor = self.linear(hidden)
        return logits


def by_encoder(clip: comfy.sd.CLIP | None, prompt: str, language: str, sampling: Sampling) -> tuple[str, str]:
    """The prompt as the loaded text encoder rewrites it, and a report.

    Raises:
        LongCatError: the CLIP is not LongCatLoader's, its checkpoint has no output head or is gone, see also
            :func:`rewriting.input_ids` and :func:`rewriting.generate`.
    """
    clip = require_longcat(clip, "LongCatPromptRewrite")
    checkpoint = formats.source(clip.patcher)
    if checkpoint is None:  # LongCatLoader notes it on every CLIP
        raise LongCatError(
            "The CLIP does not know its checkpoint. Connect the CLIP of LongCatLoader.",
            "该 CLIP 没有来源信息。请连接 LongCatLoader 的 CLIP。",
        )
    tokenizer = clip.tokenizer.tokenizer
    ids = rewriting.input_ids(checkpoint, tokenizer, prompt, language)
    rules = rewriting.generation(checkpoint, tokenizer)
    head = _head(clip, checkpoint)
    encoder, device = clip.cond_stage_model.encoder, clip.patcher.load_device
    memory = rewriting.cache_bytes(encoder, len(ids) + sampling.max_tokens)
    comfy.model_management.load_models_gpu([clip.patcher, head], memory_required=memory)
    with comfy.model_management.cuda_device_context(device):
        written, complete = rewriting.generate(encoder, head.model, ids, rules, sampling, device, host.progress())
    text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    result = rewriting.finished(text, len(written), complete)
    return result.text, _report(result, rewriting.language_of(prompt, language), "text encoder 文本编码器", sampling)


def by_endpoint(
    base_url: str, model: str, timeout: int, prompt: str, language: str, sampling: Sampling
) -> tuple[str, str]:
    """The prompt as an OpenAI-compatible endpoint rewrites it, and a report.

    The key is read from the environment on each run. It goes only to the address that the environment names beside
    it, since a graph from elsewhere may name any.

    Raises:
        LongCatError: see :func:`rewrite_endpoint.ask`.
    """
    named = os.environ.get(URL_VARIABLE, "").strip().rstrip("/")
    is_named = bool(named) and base_url.strip().rstrip("/") == named
    key = os.environ.get(KEY_VARIABLE, "").strip() if is_named else ""
    endpoint = Endpoint(base_url, model, float(timeout), key)
    question = rewriting.question(prompt, language)
    result = rewrite_endpoint.ask(endpoint, question, sampling, host.progress())
    source = f"{endpoint.host} ({model}), {'with key 带密钥' if key else 'without key 不带密钥'}"
    return result.text, _report(result, rewriting.language_of(prompt, language), source, sampling)


def _head(clip: comfy.sd.CLIP, checkpoint: Checkpoint) -> Any:
    """The patcher of the output head, which is read when it is first needed and kept with the encoder."""
    model = clip.cond_stage_model
    if model.head_patcher is None:
        config = model.encoder.model.config
        weight = rewriting.load_head(checkpoint, config.vocab_size, config.hidden_size, model.encoder.dtype)
        model.head_patcher = patchers.castable_patcher(
            _Head(weight), clip.patcher.load_device, clip.patcher.offload_device
        )
    return model.head_patcher


def _report(result: Rewrite, language: str, source: str, sampling: Sampling) -> str:
    lines = [f"source 来源: {source}", f"language 语言: {language}", f"tokens 词元: {result.tokens}"]
    if not result.complete:
        lines.append(
            f"CUT 已截断: the limit of {sampling.max_tokens} tokens came before the end of the text; raise max_tokens "
            "在文本结束之前已达到词元上限，请调大 max_tokens"
        )
        logger.warning("LongCatPromptRewrite: %s", lines[-1])
    return "\n".join(lines)
