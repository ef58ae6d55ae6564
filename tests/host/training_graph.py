"""Graphs that train LongCat-Tiny on the demo dataset, and what they leave behind."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from host.graphs import Graph
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Result

DRAWING = {"size": "custom", "size.width": 128, "size.height": 128, "steps": 10, "guidance": 2.0}
QUICK = {
    "steps": 3,
    "learning_rate": 1e-3,
    "validation_prompts": "a zorb",
    "validate_every": 0,
    "validation_steps": 1,
    "validation_guidance": 1.0,
    "checkpointing": "none",
}


def graph(name: str, checkpoint: str = "LongCat-Tiny", folder: str = "zorb", **settings: Any) -> Graph:
    """Load, read a demo dataset, train; node 3 trains. Quick unless the settings say otherwise."""
    loader = {
        "checkpoint": checkpoint,
        "engine": "auto",
        "engine.precision": "fp32",
        "text_encoder_precision": "fp32",
    }
    data = {"source": "folder", "source.folder": folder, "source.reference_folder": "", "resolutions": "128"}
    counts = {"grid": "64", "repeats": 1, "trigger_word": "", "caption_dropout": 0.0, "held_out": 0.0}
    trained = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["2", 0], "name": name}
    recipe = {"rank": 4, "targets": "attention", "base_precision": "fp32", "seed": 0, **QUICK, **settings}
    return {
        "1": {"class_type": "LongCatLoader", "inputs": loader},
        "2": {"class_type": "LongCatDataset", "inputs": {**data, **counts}},
        "3": {"class_type": "LongCatTrainLora", "inputs": {**trained, **recipe}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["3", 6]}},
    }


def add_grid(graph: Graph, key: str, prompts: list[str], model: list[Any], seeds: str = "0", **more: Any) -> None:
    """Add a LongCatPromptGrid, ``key``, and save its pictures as ``key-saved``."""
    inputs = {"model": model, "clip": ["1", 1], "vae": ["1", 2], "prompts": "\n".join(prompts), "seeds": seeds}
    graph[key] = {"class_type": "LongCatPromptGrid", "inputs": {**inputs, **DRAWING, **more}}
    graph[f"{key}-saved"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [key, 1], "filename_prefix": f"grid/{key}"},
    }


def saved(server: ComfyServer, result: Result, node: str) -> list[np.ndarray]:
    """The pictures (height, width, 3) that a SaveImage node wrote, in order."""
    references = result.outputs[node]["images"]
    return [np.asarray(Image.open(io.BytesIO(server.view(each))).convert("RGB")) for each in references]


def places_of(sheet: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Top left corners (y, x) of a picture within a larger one; the one may be rounded where the other is cut."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet.astype(int), picture.shape)[..., 0, :, :, :]
    corners = (abs(windows[..., 0, 0, :] - picture[0, 0]) <= 1).all(-1)
    return [(y, x) for y, x in np.argwhere(corners).tolist() if abs(windows[y, x] - picture).max() <= 1]


def run_folder(server: ComfyServer, name: str) -> Path:
    """Where the states of a run are."""
    return server.base_dir / "output" / "longcat_training" / "runs" / name


def lora_file(server: ComfyServer, name: str) -> Path:
    """The LoRA of a run."""
    return server.base_dir / "models" / "loras" / f"{name}.safetensors"


def tensors(server: ComfyServer, name: str, step: int) -> dict[str, torch.Tensor]:
    """What the optimiser held after a step, in float32, and the LoRA's file."""
    state = load_file(run_folder(server, name) / f"state-{step:08d}" / "adapters.safetensors")
    return {**state, **load_file(lora_file(server, name))}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit for bit."""
    assert found.keys() == expected.keys() and found
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
