"""A picture and an instruction to CONDITIONING and LATENT, as the official edit pipeline prepares them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import torch
from PIL import Image
from torch import nn

from .. import editing, latents
from ..editing import EditInput
from ..errors import LongCatError
from ..vision import VisionEncoder, load_vision
from . import clip as clip_bridge
from . import core_clip, formats, patchers
from .castable import castable, replace_linears

NODE = "LongCatEditEncode"


class Vision:
    """The vision tower with a memory manager of its own: text to image never loads it."""

    def __init__(self, encoder: VisionEncoder, patcher: Any) -> None:
        self.encoder = encoder
        self.patcher = patcher

    def inputs(self, pictures: Sequence[Image.Image], tokenizer: Any) -> list[EditInput]:
        """What the text encoder needs of each picture, with the template's tokens around it."""
        before, after = editing.split_template(tokenizer)
        comfy.model_management.load_models_gpu([self.patcher])
        device = self.patcher.load_device
        return [EditInput(before, after, self.encoder.encode(picture, device)) for picture in pictures]


def encode(
    clip: comfy.sd.CLIP | None,
    vae: comfy.sd.VAE | None,
    image: Any,
    prompt: str,
    negative_prompt: str,
    size: tuple[int, int] | None = None,
    normalise_quotes: bool = False,
) -> tuple[list[Any], list[Any], dict[str, Any], str]:
    """CONDITIONING of prompt and negative prompt, both with the picture, the picture as the LATENT to edit, a report.

    Args:
        image: IMAGE (batch, height, width, 3) in 0..1; each picture is edited by itself.
        size: width and height of canvas and reference; the official size for the picture's ratio if None.
        normalise_quotes: encode both prompts with all quotes of the kind that the model was trained on.

    Raises:
        LongCatError: CLIP or VAE are not LongCat's, the IMAGE is none or several, a size is off the grid, a prompt
            holds the picture's token, or the checkpoint has no vision tower.
    """
    clip = _require_clip(clip)
    vae = require_vae(vae, NODE)
    originals = _pictures(image)
    width, height = size or editing.canvas_size(*originals[0].size)
    latents.check_size(width, height)
    clip_bridge.warn_other_flavour(clip.patcher, NODE, edits=True)
    canvases = [editing.resized(picture, width, height) for picture in originals]
    inputs = _inputs(clip, [editing.resized(canvas, width // 2, height // 2) for canvas in canvases])
    samples = vae.encode(torch.stack([_pixels(canvas) for canvas in canvases]))
    reference = {"reference_latents": [samples], "reference_latents_method": "index"}
    (positive, report), (negative, other) = (
        _conditioning(clip, text, inputs, reference, normalise_quotes) for text in (prompt, negative_prompt)
    )
    if negative_prompt:
        report = f"{report}\n\nnegative prompt 负面提示词\n{other}"
    return positive, negative, {"samples": samples}, f"size 尺寸: {width}x{height}\n{report}"


def has_reference(conds: Iterable[Mapping[str, Any]] | None) -> bool:
    """Whether conditionings hold a picture to edit.

    Args:
        conds: their values, those of a CONDITIONING or those that a sampler hands to guidance.
    """
    return any(values.get("reference_latents") for values in conds or ())


def embed(clip: comfy.sd.CLIP, canvas: Image.Image, prompt: str) -> torch.Tensor:
    """Embeddings (length, hidden size) of an instruction and the picture that it edits, as :func:`encode` makes them.

    Args:
        canvas: the picture, in the size of the canvas already.

    Raises:
        LongCatError: as for :func:`encode`.
    """
    small = editing.resized(canvas, canvas.width // 2, canvas.height // 2)
    conditioning, _ = _conditioning(clip, prompt, _inputs(clip, [small]), {})
    embeddings: torch.Tensor = conditioning[0][0]
    return embeddings[0]


def require_one_reference(*conditionings: Iterable[Mapping[str, Any]] | None) -> None:
    """Refuse conditionings with several reference images.

    Args:
        conditionings: the values of each, as for :func:`has_reference`.

    Raises:
        LongCatError: there is more than one.
    """
    counts = [len(values.get("reference_latents") or ()) for conds in conditionings for values in conds or ()]
    if (most := max(counts, default=0)) > 1:
        raise several_references(most)


def require_vae(vae: comfy.sd.VAE | None, node: str) -> comfy.sd.VAE:
    """The VAE, if it makes LongCat's latents.

    Args:
        node: the one that asks, for the message.

    Raises:
        LongCatError: it is of another model.
    """
    fits = vae is not None and vae.latent_dim == 2 and vae.latent_channels == latents.CHANNELS
    if vae is None or not fits or vae.spacial_compression_encode() != latents.PIXELS_PER_LATENT:
        found = "nothing" if vae is None else f"one with {vae.latent_channels} channels in {vae.latent_dim} dimensions"
        raise LongCatError(
            f"{node} needs the VAE of LongCatLoader ({latents.CHANNELS} channels, {latents.PIXELS_PER_LATENT} pixels "
            f"per latent), but got {found}. Connect LongCatLoader, or VAELoader with FLUX's ae.safetensors.",
            f"{node} 需要 LongCatLoader 的 VAE（{latents.CHANNELS} 通道，{latents.PIXELS_PER_LATENT} 倍压缩），"
            f"但接入的是 {found}。请连接 LongCatLoader，或用 VAELoader 加载 FLUX 的 ae.safetensors。",
        )
    return vae


def several_references(count: int) -> LongCatError:
    """Why several reference images are refused, and what to do."""
    return LongCatError(
        f"There are {count} reference images, but LongCat-Image-Edit was trained with one, and the official pipeline "
        "takes one. Put the pictures side by side in one image, or edit in several turns. A batch of images edits "
        "each of them by itself.",
        f"共有 {count} 张参考图，但 LongCat-Image-Edit 只用一张参考图训练，官方管线也只接受一张。"
        "请把图像拼成一张，或分多次编辑。图像批次会逐张编辑。",
    )


def _require_clip(clip: comfy.sd.CLIP | None) -> comfy.sd.CLIP:
    return clip if core_clip.is_core(clip) else clip_bridge.require_longcat(clip, NODE)


def _inputs(clip: comfy.sd.CLIP, pictures: Sequence[Image.Image]) -> Sequence[Any]:
    """What the CLIP needs of each picture, in the size that it is to see."""
    if core_clip.is_core(clip):
        return [core_clip.pixels(picture) for picture in pictures]
    return _vision(clip).inputs(pictures, clip.tokenizer.tokenizer)


def _conditioning(
    clip: comfy.sd.CLIP,
    prompt: str,
    inputs: Sequence[Any],
    reference: dict[str, Any],
    normalise_quotes: bool = False,
) -> tuple[list[Any], str]:
    core = core_clip.is_core(clip)
    tokenizer = core_clip.tokenizer(clip) if core else clip.tokenizer
    tokens, report = clip_bridge.inspect(tokenizer, NODE, prompt, normalise_quotes)
    editing.check_instruction(tokens.ids, editing.image_token(tokenizer.tokenizer))
    if core:
        return core_clip.encode(clip, tokens.ids, inputs, reference), report
    conditioning: list[Any] = clip.encode_from_tokens_scheduled(
        clip_bridge.edit_tokens(tokens.ids, inputs), add_dict=reference
    )
    return conditioning, report


def _vision(clip: comfy.sd.CLIP) -> Vision:
    """The CLIP's vision tower, loaded when the first picture is encoded."""
    model = clip.cond_stage_model
    if model.vision is None:
        model.vision = _load(clip)
    vision: Vision = model.vision
    return vision


def _load(clip: comfy.sd.CLIP) -> Vision:
    checkpoint = formats.source(clip.patcher)
    if checkpoint is None:
        raise LongCatError(
            "It is not known where this CLIP was loaded from, so its vision tower cannot be loaded. Connect the CLIP "
            "of LongCatLoader.",
            "无法得知该 CLIP 的来源，因此无法加载视觉塔。请连接 LongCatLoader 的 CLIP。",
        )
    dtype = clip.cond_stage_model.encoder.dtype

    def prepare(tower: nn.Module) -> None:
        replace_linears(tower, lambda name, layer: castable(comfy.ops.manual_cast, layer, dtype))

    encoder = load_vision(checkpoint, dtype, prepare)
    return Vision(encoder, patchers.castable_patcher(encoder, clip.patcher.load_device, clip.patcher.offload_device))


def _pictures(image: Any) -> list[Image.Image]:
    """The pictures of an IMAGE in 8 bits, as the pipeline gets them; an alpha channel is left out."""
    if isinstance(image, list | tuple) and len(image) > 1:
        raise several_references(len(image))
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[-1] < 3 or not image.numel():
        found = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise LongCatError(
            f"{NODE} needs a picture to edit, an IMAGE of shape (batch, height, width, 3), but got {found}. Connect "
            "LoadImage; to draw from text alone, use LongCatTextEncode.",
            f"{NODE} 需要一张待编辑的图像（形状为 (batch, height, width, 3) 的 IMAGE），但接入的是 {found}。"
            "请连接 LoadImage；若只从文本生成，请使用 LongCatTextEncode。",
        )
    pixels = (image[..., :3].float().nan_to_num().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def _pixels(picture: Image.Image) -> torch.Tensor:
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.reshape(picture.height, picture.width, 3).float() / 255
