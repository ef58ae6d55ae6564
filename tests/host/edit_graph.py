"""The edit graph of the host and device tests, its picture, and what the reference pipeline makes of it."""

from pathlib import Path

import edit_checkpoint
import numpy as np
import torch
from PIL import Image

from host.graphs import Graph
from longcat_pack.longcat_backend import latents
from longcat_pack.tools.host import ComfyServer
from parity import edit_reference

CHECKPOINT = "Tiny-Edit"
PICTURE = "edit.png"
PROMPT = "把背景改成蓝色"
SEED = 5
STEPS = 3
SOURCE = (150, 100)
SIZE = (96, 64)  # of SOURCE at an area of 96·64


def source() -> Image.Image:
    """The picture to edit: smooth random colours."""
    blocks = np.random.default_rng(1).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(SOURCE, Image.Resampling.BICUBIC)


def install(server: ComfyServer, demo: Path) -> tuple[Path, Path]:
    """Put an edit checkpoint and the picture into the server's folders; the folder and the file."""
    folder = server.base_dir / "models" / "longcat_image" / CHECKPOINT
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = server.base_dir / "input" / PICTURE
    file.parent.mkdir(parents=True, exist_ok=True)
    source().save(file)
    return edit_checkpoint.make(demo, folder), file


def expected(folder: Path, device: torch.device) -> torch.Tensor:
    """The reference pipeline's latents (1, 16, h, w) in fp32, unscaled."""
    pipe = edit_reference.pipeline(folder).to(device)
    settings = {"guidance_scale": 4.5, "num_inference_steps": STEPS}
    packed = edit_reference.draw(pipe, source(), PROMPT, SIZE[0] * SIZE[1], seed=SEED, **settings)
    return latents.unpack_scaled(packed.cpu(), pipe.vae.config, *SIZE)


def graph() -> Graph:
    """Load in fp32, encode, sample; node 5 is the sampler."""
    loader = {"checkpoint": CHECKPOINT, "engine": "core", "engine.precision": "fp32", "text_encoder_precision": "fp32"}
    encode = {"clip": ["1", 1], "vae": ["1", 2], "image": ["2", 0], "prompt": PROMPT, "negative_prompt": ""}
    size = {"size": "custom", "size.width": SIZE[0], "size.height": SIZE[1]}
    sample = {"model": ["1", 0], "positive": ["3", 0], "negative": ["3", 1], "latent": ["3", 2], "seed": SEED}
    settings = {"steps": STEPS, "guidance": 4.5, "renorm": True, "renorm_min": 0.0, "denoise": 1.0}
    return {
        "1": {"class_type": "LongCatLoader", "inputs": loader},
        "2": {"class_type": "LoadImage", "inputs": {"image": PICTURE}},
        "3": {"class_type": "LongCatEditEncode", "inputs": {**encode, **size}},
        "5": {"class_type": "LongCatSampler", "inputs": {**sample, **settings}},
    }
