"""Let diffusers' own pipeline draw the held-out prompts from a folder, and score the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LongCatImagePipeline
from PIL import Image

from tests.scoring.scenes import IMAGE_SIZE, held_out_prompts
from tools.tiny.checkpoint import load_pipeline
from tools.tiny.conditioning import PAD_POSITION
from tools.tiny.sampling import score

COLUMNS = 20


def use_official_positions(pipeline: LongCatImagePipeline) -> None:
    """Make this pipeline's text encoder place pads at position 1, as transformers 4.57.1 did."""
    forward = pipeline.text_encoder.forward

    def positioned(attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, PAD_POSITION)
        return forward(attention_mask=attention_mask, position_ids=positions.expand(3, -1, -1), **kwargs)

    pipeline.text_encoder.forward = positioned


def draw(pipeline: LongCatImagePipeline, prompts: list[str]) -> np.ndarray:
    """Pictures (N, 128, 128, 3) uint8: 20 steps, guidance 4; the seed is the prompt's index."""
    pictures = [
        pipeline(
            prompt,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=20,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            enable_prompt_rewrite=False,
            output_type="np",
        ).images[0]
        for seed, prompt in enumerate(prompts)
    ]
    return (np.stack(pictures) * 255).round().astype(np.uint8)


def write_sheet(pictures: np.ndarray, path: Path) -> None:
    """Write pictures (N, 128, 128, 3) uint8 as one PNG, row by row; an incomplete last row is left out."""
    columns = min(COLUMNS, len(pictures))
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures) - columns + 1, columns)]
    Image.fromarray(np.concatenate(rows)).save(path)


def check_folder(folder: Path, per_language: int, stock_positions: bool, sheet: Path | None) -> None:
    """Print the scores of each language; with `sheet`, write all pictures as one PNG."""
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    if not stock_positions:
        use_official_positions(pipeline)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = held_out_prompts(per_language, per_language)
    pictures = draw(pipeline, [prompt for prompt, _ in pairs])
    scenes = [scene for _, scene in pairs]
    parts = {"zh": slice(0, per_language), "en": slice(per_language, None), "both": slice(None)}
    for name, part in parts.items():
        scores = score(pictures[part], scenes[part])
        print(f"{name:5}", " ".join(f"{attribute} {value:.3f}" for attribute, value in scores.items()), flush=True)
    if sheet:
        write_sheet(pictures, sheet)
