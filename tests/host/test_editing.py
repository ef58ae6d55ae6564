"""Through the real server: a picture that LoadImage reads is edited as by the official pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from host import edit_graph, graphs
from host.bad_input import failed, rejected
from host.graphs import Graph
from longcat_pack.tools.host import ComfyServer

ENGINES = ["core", "diffusers"]


@pytest.fixture(scope="module")
def edit_folder(server: ComfyServer, pack_dir: Path) -> Iterator[Path]:
    """An edit checkpoint and the picture in the server's folders, taken away afterwards."""
    folder, picture = edit_graph.install(server, pack_dir / "demo" / "LongCat-Tiny")
    yield folder
    shutil.rmtree(folder)
    picture.unlink()


@pytest.fixture
def graph(edit_folder: Path) -> Graph:
    """Load, encode, sample; node 5 is the sampler."""
    return edit_graph.graph()


@pytest.fixture(scope="module")
def expected(edit_folder: Path) -> torch.Tensor:
    """The reference pipeline's latents (1, 16, h, w), unscaled."""
    return edit_graph.expected(edit_folder, torch.device("cpu"))


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_edit_is_the_pipelines(server: ComfyServer, graph: Graph, engine: str, expected: torch.Tensor) -> None:
    drawn = graphs.saved_latent(server, graphs.changed(graph, **{"1.engine": engine}), "5")
    assert relative_error(drawn, expected) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_core_samplers_edit_alike(server: ComfyServer, graph: Graph, engine: str, expected: torch.Tensor) -> None:
    graph = graphs.custom_sampler(graphs.changed(graph, **{"1.engine": engine}))
    assert relative_error(graphs.saved_latent(server, graph, "5"), expected) <= 1e-4


@pytest.mark.parametrize("sampler", ["LongCatSampler", "KSampler"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_masked_edit_keeps_the_outside(server: ComfyServer, graph: Graph, engine: str, sampler: str) -> None:
    """But for the rounding of ComfyUI's scale for latents, there and back."""
    graph = graphs.changed(graph, **{"1.engine": engine})
    width, height = edit_graph.SIZE
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
    masked = graphs.changed(graph, **{"5.latent": ["masked", 0]})
    after = graphs.saved_latent(server, graphs.k_sampler(masked) if sampler == "KSampler" else masked, "5")
    half = width // 16
    assert torch.allclose(after[..., half:], before[..., half:], rtol=0, atol=1e-6)
    assert (after[..., :half] - before[..., :half]).abs().mean() > 0.1


def test_a_batch_is_edited_picture_by_picture(server: ComfyServer, graph: Graph) -> None:
    single = graphs.saved_latent(server, graph, "5")
    graph["other"] = {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}}
    graph["batch"] = {"class_type": "ImageBatch", "inputs": {"image1": ["2", 0], "image2": ["other", 0]}}
    both = graphs.saved_latent(server, graphs.changed(graph, **{"3.image": ["batch", 0]}), "5")
    assert both.shape == (2, *single.shape[1:])
    assert relative_error(both[:1], single) <= 1e-4


@pytest.mark.parametrize("make", [graphs.custom_sampler, lambda graph: graph], ids=["core", "ours"])
def test_a_second_reference_is_refused_with_the_reason(
    server: ComfyServer, graph: Graph, make: Callable[[Graph], Graph]
) -> None:
    graph["second"] = {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["3", 0], "latent": ["3", 2]}}
    graph = graphs.with_latent_saved(make(graphs.changed(graph, **{"5.positive": ["second", 0]})), "5")
    failed(server, graph, "5", ["2 reference images", "official pipeline takes one"])


def test_a_size_off_the_grid_is_refused_before_anything_is_loaded(server: ComfyServer, graph: Graph) -> None:
    graph = graphs.with_latent_saved(graphs.changed(graph, **{"3.size.width": 100}), "5")
    rejected(server, graph, "3", ["width 100", "96 / 112"])


def test_a_text_to_image_checkpoint_edits_with_a_warning(server: ComfyServer, graph: Graph) -> None:
    graphs.saved_latent(server, graphs.changed(graph, **{"1.checkpoint": "LongCat-Tiny", "5.steps": 1}), "5")
    for node in ("LongCatEditEncode", "LongCatSampler"):
        assert f"{node}: the checkpoint is LongCat-Image final, which draws from text" in server.log_text()


def test_an_edit_checkpoint_draws_from_text_with_a_warning(
    server: ComfyServer, edit_folder: Path, api_workflow: Callable[[str], Graph]
) -> None:
    drawing = graphs.changed(api_workflow("text_to_image"), **{"1.checkpoint": edit_folder.name, "5.steps": 1})
    assert server.run(drawing).images
    for node in ("LongCatTextEncode", "LongCatSampler"):
        assert f"{node}: the checkpoint is LongCat-Image edit, which edits a given picture" in server.log_text()


def test_flavour_defaults_take_the_place_of_the_settings_and_are_shown(server: ComfyServer, graph: Graph) -> None:
    settings = {"5.flavour_defaults": True, "5.steps": 2, "5.guidance": 1.0}
    result = server.run(graphs.with_latent_saved(graphs.changed(graph, **settings), "5"))
    assert max(graphs.progress_steps(result)) == 50
    told = [event.data["text"] for event in result.events if event.type == "progress_text"]
    assert "edit: steps 步数 50, guidance 引导强度 4.5" in told
