"""The reference of editing: diffusers' own pipeline, with the positions of transformers 4.57.1 (D4)."""

from pathlib import Path
from typing import Any

import torch
from diffusers import LongCatImageEditPipeline
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as upstream
from PIL import Image

PAD_POSITION = 1


def pipeline(folder: Path) -> LongCatImageEditPipeline:
    """The pipeline of a checkpoint folder in fp32; its encoder gets the official positions."""
    pipe = LongCatImageEditPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.register_forward_pre_hook(_official_positions, with_kwargs=True)
    return pipe


def _official_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """As ``get_rope_index`` of 4.57.1 for one picture; every masked token is at 1."""
    ids, mask = kwargs["input_ids"][0].tolist(), kwargs["attention_mask"][0].tolist()
    _, height, width = (kwargs["image_grid_thw"][0].cpu() // torch.tensor([1, 2, 2])).tolist()
    start = ids.index(module.config.image_token_id)
    columns, following = [], start
    for index, kept in enumerate(mask):
        inside = index - start
        if not kept:
            columns.append([PAD_POSITION] * 3)
        elif index < start:
            columns.append([index] * 3)
        elif inside < height * width:
            columns.append([start, start + inside // width, start + inside % width])
            following = start + max(height, width)
        else:
            columns.append([following] * 3)
            following += 1
    positions = torch.tensor(columns, device=kwargs["input_ids"].device)
    return args, {**kwargs, "position_ids": positions.T[:, None]}


def draw(
    pipe: LongCatImageEditPipeline, picture: Image.Image, prompt: str, area: int, *, seed: int, **settings: Any
) -> torch.Tensor:
    """Run the pipeline at an area of its own; packed, scaled latents."""
    original = upstream.calculate_dimensions
    upstream.calculate_dimensions = lambda _, ratio: original(area, ratio)
    try:
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipe(picture, prompt, generator=generator, output_type="latent", **settings).images
    finally:
        upstream.calculate_dimensions = original
