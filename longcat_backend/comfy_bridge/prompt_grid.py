"""Prompts × seeds × LoRA strengths as one labelled picture, drawn by the graph's own MODEL, CLIP and VAE."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import latent_preview
import torch

from .. import labelled_grid, latents, lora_files
from ..errors import LongCatError
from . import clip as clip_bridge
from . import editing, guidance, host, lora, sampling
from . import vae as vae_bridge

MOST_PICTURES = 400
LARGEST_PREVIEW = 1536


@dataclass(frozen=True)
class Settings:
    """How each picture is drawn.

    Attributes:
        size: width and height; None for an edit at the official size.
        renorm: of text to image; an edit is always drawn without.
    """

    size: tuple[int, int] | None
    steps: int
    guidance: float
    renorm: bool
    negative_prompt: str


@dataclass(frozen=True)
class Variant:
    """A column's model, and what the columns are called where there is more than one variant."""

    label: str
    model: comfy.model_patcher.ModelPatcher


def prompt_lines(text: str) -> list[str]:
    """One prompt a line; empty lines are none.

    Raises:
        LongCatError: there is none.
    """
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise LongCatError("There is no prompt. Put one prompt in each line.", "没有提示词。请每行写一条提示词。")
    return prompts


def numbers(text: str, name: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers from a list such as "0, 0.5 1".

    Raises:
        LongCatError: it is empty, one is no number of that kind, or a whole number is negative or too large.
    """
    parts = [part for part in re.split(r"[\s,;，；、]+", text) if part]
    try:
        found = [kind(part) for part in parts]
    except ValueError:
        found = []
    if not found or any(kind is int and not 0 <= value <= sampling.MAX_SEED for value in found):
        example = "0, 1, 2" if kind is int else "0, 0.5, 1"
        raise LongCatError(
            f"{name} is '{text}'. Put numbers with commas between them, such as {example}.",
            f"{name} 为“{text}”。请填写以逗号分隔的数字，例如 {example}。",
        )
    return found


def check_count(prompts: Sequence[str], seeds: Sequence[int], variants: int) -> None:
    """Refuse a grid that would take for ever.

    Raises:
        LongCatError: there are more than 400 pictures.
    """
    count = len(prompts) * len(seeds) * variants
    if count > MOST_PICTURES:
        raise LongCatError(
            f"{len(prompts)} prompts × {len(seeds)} seeds × {variants} strengths are {count} pictures. Use at most "
            f"{MOST_PICTURES}, in several grids if need be.",
            f"{len(prompts)} 条提示词 × {len(seeds)} 个种子 × {variants} 个强度共 {count} 张图像。"
            f"请使用不超过 {MOST_PICTURES} 张，必要时分成几个网格。",
        )


def lora_variants(model: comfy.model_patcher.ModelPatcher, name: str, strengths: Sequence[float]) -> list[Variant]:
    """The MODEL with a LoRA of models/loras at each strength.

    Raises:
        LongCatError: see :func:`lora.find`, :func:`lora_files.read` and :func:`lora.apply`.
    """
    adapters = lora_files.read(lora.find(name)).adapters
    return [Variant(f"strength {strength:g}", lora.apply(model, adapters, strength)[0]) for strength in strengths]


def draw(
    variants: Sequence[Variant],
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    image: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """All pictures: a row for each prompt, a column for each seed and variant.

    Each is what LongCatSampler draws of the same settings. The grid so far is the node's preview.

    Args:
        image: (1, height, width, 3) to be edited by each prompt; None draws from text.

    Returns:
        The grid (1, H, W, 3), the pictures (rows · columns, height, width, 3) row by row, and the rows' legend.

    Raises:
        LongCatError: MODEL, CLIP or VAE are not LongCat's, there are several images, or too many pictures.
    """
    check_count(prompts, seeds, len(variants))
    columns = _columns(seeds, variants)
    bar = _Bar(len(prompts) * len(columns), settings.steps)
    pictures: list[torch.Tensor] = []
    for positive, negative, latent in _conditionings(clip, vae, prompts, settings, image):
        for seed in seeds:
            for variant in variants:
                renorm = settings.renorm and image is None
                samples = _sample(variant.model, (positive, negative), latent, seed, settings, renorm, bar)
                pictures.append(vae_bridge.decode(vae, samples, tiled=False)[0])
                bar.finish(labelled_grid.grid(pictures, prompts, columns))
    sheet = labelled_grid.grid(pictures, prompts, columns)
    return labelled_grid.as_tensor(sheet), torch.stack(pictures), labelled_grid.legend(prompts)


def _columns(seeds: Sequence[int], variants: Sequence[Variant]) -> list[str]:
    return [" · ".join(filter(None, (f"seed {seed}", variant.label))) for seed in seeds for variant in variants]


def _conditionings(
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    prompts: Sequence[str],
    settings: Settings,
    image: torch.Tensor | None,
) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Positive, negative and latent of each prompt."""
    if image is not None:
        if len(image) != 1:
            raise LongCatError(
                f"There are {len(image)} images. Connect one; a batch can be edited in several grids.",
                f"接入了 {len(image)} 张图像。请只接入一张；批次可分多个网格编辑。",
            )
        for prompt in prompts:
            positive, negative, latent, _ = editing.encode(
                clip, vae, image, prompt, settings.negative_prompt, settings.size
            )
            yield positive, negative, latent
        return
    width, height = settings.size or (1024, 1024)
    negative, _ = clip_bridge.encode(clip, settings.negative_prompt)
    for prompt in prompts:
        positive, _ = clip_bridge.encode(clip, prompt)
        yield positive, negative, {"samples": latents.empty_latent(width, height, 1)}


def _sample(
    model: comfy.model_patcher.ModelPatcher,
    prompts: tuple[Any, Any],
    latent: dict[str, Any],
    seed: int,
    settings: Settings,
    renorm: bool,
    bar: "_Bar",
) -> torch.Tensor:
    patched = guidance.patch_renorm(model, renorm, 0.0)
    sigmas = sampling.schedule(patched, latent, settings.steps)
    samples = latent["samples"]
    drawn: torch.Tensor = comfy.sample.sample_custom(
        patched,
        comfy.sample.prepare_noise(samples, seed),
        max(settings.guidance, 1.0),
        comfy.samplers.sampler_object("euler"),
        sigmas,
        *prompts,
        samples,
        callback=bar.callback(patched),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return drawn


class _Bar:
    """One progress bar over the steps of all pictures; ends the node when the user interrupts."""

    def __init__(self, pictures: int, steps: int) -> None:
        self.pictures, self.steps = pictures, steps
        self.done = 0
        self.bar = comfy.utils.ProgressBar(pictures * steps)

    def callback(self, model: comfy.model_patcher.ModelPatcher) -> Any:
        """ComfyUI's sampling callback: the latent as it is now is the preview."""
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

        def show(step: int, x0: torch.Tensor, x: torch.Tensor, total: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            self.bar.update_absolute(self.done * self.steps + step + 1, preview=preview)

        return show

    def finish(self, sheet: Any) -> None:
        """One picture more: the grid so far is the preview."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        self.bar.update_absolute(self.done * self.steps, preview=("JPEG", sheet, min(max(sheet.size), LARGEST_PREVIEW)))
        host.show_text(f"{self.done} / {self.pictures}")
