"""The reference of every parity test: diffusers' own pipeline, with the text positions of transformers 4.57.1 (D4)."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import LongCatImagePipeline

PAD_POSITION = 1


@lru_cache(maxsize=1)
def pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> LongCatImagePipeline:
    """The pipeline of a checkpoint folder; its encoder gets its positions from the attention mask."""
    pipe = LongCatImagePipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.register_forward_pre_hook(_official_positions, with_kwargs=True)
    return pipe


def _official_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = kwargs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, PAD_POSITION)
    return args, {**kwargs, "position_ids": positions.expand(3, -1, -1)}


def draw(pipe: LongCatImagePipeline, prompt: str, *, seed: int, output: str, **settings: Any) -> torch.Tensor:
    """Run the pipeline; ``output`` is "latent" (packed, scaled) or "pt" (pictures in 0..1)."""
    return pipe(
        prompt,
        generator=torch.Generator("cpu").manual_seed(seed),
        enable_prompt_rewrite=False,
        output_type=output,
        **settings,
    ).images
