"""Through the real server: a picture that LoadImage reads is edited as by the official pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import edit_checkpoint
import numpy as np
import pytest
import torch
from PIL import Image

from host import graphs
from host.bad_input import failed, rejected
from host.graphs import Graph
from longcat_pack.longcat_backend import latents
from longcat_pack.tools.host import ComfyServer
from parity import edit_reference as ref

CHECKPOINT = "Tiny-Edit"
ENGINES = ["core", "diffusers"]
PROMPT = "把背景改成蓝色"
SEED = 5
STEPS = 3
SOURCE = (150, 100)
SIZE = (96, 64)  # of SOURCE at an area of 96·64


@pytest.fixture(scope="module")
def source() -> Image.Image:
    """The picture to edit: smooth random colours."""
    blocks = np.random.default_rng(1).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(SOURCE, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def edit_folder(server: ComfyServer, pack_dir: Path, source: Image.Image) -> Iterator[Path]:
    """An edit checkpoint and the picture in the server's folders, taken away afterwards."""
    folder = server.base_dir / "models" / "longcat_image" / CHECKPOINT
    folder.parent.mkdir(parents=True, exist_ok=True)
    edit_checkpoint.make(pack_dir / "demo" / "LongCat-Tiny", folder)
    file = server.base_dir / "input" / "edit.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    source.save(file)
    yield folder
    shutil.rmtree(folder)
    file.unlink()


@pytest.fixture
def graph(edit_folder: Path) -> Graph:
    """Load, encode, sample; node 5 is the sampler."""
    return {
        "1": {
            "class_type": "LongCatLoader",
            "inputs": {
                "checkpoint": CHECKPOINT,
                "engine": "core",
                "engine.precision": "fp32",
                "text_encoder_precision": "fp32",
            },
        },
        "2": {"class_type": "LoadImage", "inputs": {"image": "edit.png"}},
        "3": {
            "class_type": "LongCatEditEncode",
            "inputs": {
                "clip": ["1", 1],
                "vae": ["1", 2],
                "image": ["2", 0],
                "prompt": PROMPT,
                "negative_prompt": "",
                "size": "custom",
                "size.width": SIZE[0],
                "size.height": SIZE[1],
            },
        },
        "5": {
            "class_type": "LongCatSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["3", 0],
                "negative": ["3", 1],
                "latent": ["3", 2],
                "seed": SEED,
                "steps": STEPS,
                "guidance": 4.5,
                "renorm": False,
                "renorm_min": 0.0,
                "denoise": 1.0,
            },
        },
    }


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def expected(edit_folder: Path, source: Image.Image) -> torch.Tensor:
    """The reference pipeline's latents (batch, 16, h, w), unscaled."""
    pipe = ref.pipeline(edit_folder)
    packed = ref.draw(pipe, source, PROMPT, SIZE[0] * SIZE[1], seed=SEED, guidance_scale=4.5, num_inference_steps=STEPS)
    return latents.unpack_scaled(packed, pipe.vae.config, *SIZE)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_edit_is_the_pipelines(server: ComfyServer, graph: Graph, engine: str, expected: torch.Tensor) -> None:
    drawn = graphs.saved_latent(server, graphs.changed(graph, **{"1.engine": engine}), "5")
    assert relative_error(drawn, expected) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_core_samplers_edit_alike(server: ComfyServer, graph: Graph, engine: str, expected: torch.Tensor) -> None:
    graph = graphs.custom_sampler(graphs.changed(graph, **{"1.engine": engine}))
    assert relative_error(graphs.saved_latent(server, graph, "5"), expected) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_masked_edit_keeps_the_outside(server: ComfyServer, graph: Graph, engine: str) -> None:
    graph = graphs.changed(graph, **{"1.engine": engine})
    width, height = SIZE
    graph["outside"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": width, "height": height}}
    graph["inside"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": width // 2, "height": height}}
    graph["mask"] = {
        "class_type": "MaskComposite",
        "inputs": {"destination": ["outside", 0], "source": ["inside", 0], "x": 0, "y": 0, "operation": "add"},
    }
    graph["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["3", 2], "mask": ["mask", 0]}}
    canvas = deepcopy(graph)
    canvas["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": ["3", 2], "filename_prefix": "latents/test"}}
    before = graphs.read_latent(server, server.run(canvas), "latent")
    after = graphs.saved_latent(server, graphs.changed(graph, **{"5.latent": ["masked", 0]}), "5")
    half = width // 16
    assert torch.allclose(after[..., half:], before[..., half:], atol=1e-5)
    assert (after[..., :half] - before[..., :half]).abs().mean() > 0.1


def test_a_batch_is_edited_picture_by_picture(server: ComfyServer, graph: Graph) -> None:
    single = graphs.saved_latent(server, graph, "5")
    graph["other"] = {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}}
    graph["batch"] = {"class_type": "ImageBatch", "inputs": {"image1": ["2", 0], "image2": ["other", 0]}}
    both = graphs.saved_latent(server, graphs.changed(graph, **{"3.image": ["batch", 0]}), "5")
    assert both.shape == (2, *single.shape[1:])
    assert relative_error(both[:1], single) <= 1e-4


def test_a_second_reference_is_refused_with_the_reason(server: ComfyServer, graph: Graph) -> None:
    graph["second"] = {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["3", 0], "latent": ["3", 2]}}
    graph = graphs.with_latent_saved(graphs.changed(graph, **{"5.positive": ["second", 0]}), "5")
    failed(server, graph, "5", ["2 reference images", "official pipeline takes one"])


def test_a_size_off_the_grid_is_refused_before_anything_is_loaded(server: ComfyServer, graph: Graph) -> None:
    graph = graphs.with_latent_saved(graphs.changed(graph, **{"3.size.width": 100}), "5")
    rejected(server, graph, "3", ["width 100", "96 / 112"])


def test_a_text_to_image_checkpoint_edits_with_a_warning(server: ComfyServer, graph: Graph) -> None:
    graphs.saved_latent(server, graphs.changed(graph, **{"1.checkpoint": "LongCat-Tiny", "5.steps": 1}), "5")
    assert "LongCatEditEncode: the checkpoint is LongCat-Image final" in server.log_text()
