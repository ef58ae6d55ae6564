"""Let diffusers' own pipeline draw the held-out prompts from a folder, and score the pictures and the rewrites."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LongCatImagePipeline
from PIL import Image

from tests.scoring.characters import without_quotes
from tests.scoring.requests import held_out_requests, read_caption
from tests.scoring.scenes import IMAGE_SIZE, LANGUAGES, Scene, held_out_character_prompts, held_out_prompts
from tools.tiny.checkpoint import load_pipeline
from tools.tiny.conditioning import PAD_POSITION
from tools.tiny.sampling import sample, score, score_characters
from tools.tiny.writing import score_writing

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


Draw = Callable[[list[str]], np.ndarray]


def _say(name: str, scores: dict[str, float]) -> None:
    print(f"{name:18}", " ".join(f"{attribute} {value:.3f}" for attribute, value in scores.items()), flush=True)


def check_shapes(drawn: Draw, per_language: int) -> np.ndarray:
    """Print the scores of each language's held-out prompts; returns the pictures."""
    pairs = held_out_prompts(per_language, per_language)
    pictures = drawn([prompt for prompt, _ in pairs])
    scenes = [scene for _, scene in pairs]
    for name, part in _halves(per_language).items():
        _say(name, score(pictures[part], scenes[part]))
    return pictures


def check_characters(drawn: Draw, per_language: int) -> np.ndarray:
    """Print how often a held-out prompt's character is drawn, and how often without its quotes; returns pictures."""
    pairs = held_out_character_prompts(per_language, per_language)
    prompts, scenes = [prompt for prompt, _ in pairs], [scene for _, scene in pairs]
    quoted, unquoted = drawn(prompts), drawn([without_quotes(prompt) for prompt in prompts])
    for name, part in _halves(per_language).items():
        _say(f"{name} quoted", {"character": score_characters(quoted[part], scenes[part])})
        _say(f"{name} unquoted", {"character": score_characters(unquoted[part], scenes[part])})
    return np.concatenate([quoted, unquoted])


def check_rewriting(pipeline: LongCatImagePipeline, drawn: Draw, per_language: int) -> np.ndarray:
    """Print how many rewrites keep what was stated, and the scores of their pictures; returns those."""
    half = min(per_language, 50)
    requests = held_out_requests(half, half)
    share, answers = score_writing(pipeline, requests)
    _say("rewrites", {"greedy": share, "sampled": score_writing(pipeline, requests, temperature=1.0)[0]})
    for request, text in answers[:: max(1, half // 5)]:
        print(f"    {request.text} -> {text}")
    read = [(text, read_caption(text, request.language)) for request, text in answers]
    full: list[tuple[str, Scene]] = [(text, scene) for text, scene in read if scene is not None]
    if not full:
        return np.empty((0, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    pictures = drawn([text for text, _ in full])
    _say("their pictures", score(pictures, [scene for _, scene in full]))
    return pictures


def _halves(count: int) -> dict[str, slice]:
    return {LANGUAGES[0]: slice(0, count), LANGUAGES[1]: slice(count, None), "both": slice(None)}


def check_folder(folder: Path, per_language: int, stock_positions: bool, sheet: Path | None, at_once: bool) -> None:
    """Print the scores of each language; with `sheet`, write all pictures as one PNG.

    `at_once` draws with the trainer's own sampler instead, which is faster on a GPU.
    """
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    drawn: Draw
    if at_once:
        drawn = partial(sample, pipeline)
    else:
        stock = load_pipeline(folder).to(pipeline.device)
        stock.set_progress_bar_config(disable=True)
        if not stock_positions:
            use_official_positions(stock)
        drawn = partial(draw, stock)
    pictures = [check_shapes(drawn, per_language), check_characters(drawn, per_language)]
    pictures.append(check_rewriting(pipeline, drawn, per_language))
    if sheet:
        write_sheet(np.concatenate(pictures), sheet)
