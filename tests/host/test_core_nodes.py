"""Our MODEL, CLIP, VAE and LATENT in core's own nodes, over a real server's API."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from host import graphs
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Event, Interrupted

Load = Callable[[str], dict[str, Any]]
ENGINES = ["core", "diffusers"]
RED = 0xD21E28


@pytest.fixture
def graph(api_workflow: Load) -> dict[str, Any]:
    """Text to image in fewer steps than the workflow's."""
    return graphs.changed(api_workflow("text_to_image"), **{"5.steps": 6})


def picture(server: ComfyServer, graph: dict[str, Any]) -> np.ndarray:
    result = server.run(graph)
    return np.array(Image.open(io.BytesIO(server.view(result.images[0]))).convert("RGB"))


@pytest.mark.parametrize("engine", ENGINES)
def test_core_sampling_nodes_equal_longcat_sampler(server: ComfyServer, graph: Any, engine: str) -> None:
    graph = graphs.changed(graph, **{"1.engine": engine, "5.steps": 20})
    ours = graphs.saved_latent(server, graph, "5")
    cores = graphs.saved_latent(server, graphs.custom_sampler(graph), "5")
    assert (ours - cores).norm() / ours.norm() <= 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_ksampler_with_guidance_and_flux_shift_is_the_official_schedule(
    server: ComfyServer, api_workflow: Load, engine: str
) -> None:
    ours = graphs.changed(api_workflow("text_to_image"), **{"1.engine": engine})
    cores = graphs.changed(api_workflow("text_to_image_ksampler"), **{"1.engine": engine})
    expected = graphs.saved_latent(server, ours, "5")
    drawn = graphs.saved_latent(server, cores, "7")
    # KSampler takes its sigmas from a table of 10,000.
    assert (drawn - expected).norm() / expected.norm() <= 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_noise_mask_changes_the_inside_and_keeps_the_outside(server: ComfyServer, graph: Any, engine: str) -> None:
    graph = graphs.from_picture(graphs.changed(graph, **{"1.engine": engine}), RED)
    graph["outside"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 128, "height": 128}}
    graph["inside"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 128}}
    graph["mask"] = {
        "class_type": "MaskComposite",
        "inputs": {"destination": ["outside", 0], "source": ["inside", 0], "x": 0, "y": 0, "operation": "add"},
    }
    graph["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["4", 0], "mask": ["mask", 0]}}
    before = graphs.saved_latent(server, graph, "4")
    after = graphs.saved_latent(server, graphs.changed(graph, **{"5.latent": ["masked", 0]}), "5")
    assert torch.allclose(after[..., 8:], before[..., 8:], atol=1e-5)
    assert (after[..., :8] - before[..., :8]).abs().mean() > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_two_holds_two_pictures_of_which_the_first_is_the_single_ones(
    server: ComfyServer, graph: Any, engine: str
) -> None:
    graph = graphs.changed(graph, **{"1.engine": engine})
    single = graphs.saved_latent(server, graph, "5")
    batch = graphs.saved_latent(server, graphs.changed(graph, **{"4.batch_size": 2}), "5")
    assert batch.shape == (2, *single.shape[1:])
    assert (batch[:1] - single).norm() / single.norm() <= 1e-4
    assert (batch[1:] - single).norm() / single.norm() > 0.1


@pytest.mark.parametrize("sampler", ["ours", "KSampler"])
def test_image_to_image_keeps_more_of_the_picture_the_lower_denoise_is(
    server: ComfyServer, graph: Any, api_workflow: Load, sampler: str
) -> None:
    node = "5"
    if sampler == "KSampler":
        node = "7"
        graph = graphs.changed(api_workflow("text_to_image_ksampler"), **{"7.steps": 6})
    graph = graphs.from_picture(graph, RED)
    before = graphs.saved_latent(server, graph, "4")
    distances = [
        float((graphs.saved_latent(server, graphs.changed(graph, **{f"{node}.denoise": d}), node) - before).norm())
        for d in (0.0, 0.2, 1.0)
    ]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_longcat_decode_equals_vae_decode(server: ComfyServer, graph: Any) -> None:
    ours = picture(server, graph)
    graph["6"] = {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}}
    assert np.array_equal(picture(server, graph), ours)


def test_tiled_decode_draws_the_same_picture(server: ComfyServer, graph: Any) -> None:
    whole = picture(server, graph).astype(int)
    tiled = picture(server, graphs.changed(graph, **{"6.tiled": True})).astype(int)
    assert np.abs(tiled - whole).max() <= 2


def test_cores_text_encode_equals_ours(server: ComfyServer, graph: Any) -> None:
    ours = graphs.saved_latent(server, graph, "5")
    for node in ("2", "3"):
        text = graph[node]["inputs"]["prompt"]
        graph[node] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}
    assert torch.equal(graphs.saved_latent(server, graph, "5"), ours)


def test_progress_and_previews_arrive_while_sampling(server: ComfyServer, graph: Any) -> None:
    result = server.run(graphs.changed(graph, **{"5.seed": 101}), extra_data=graphs.PREVIEWS)
    assert graphs.progress_steps(result)[-1] == 6
    assert len(result.previews) >= 3
    for preview in result.previews:
        image = Image.open(io.BytesIO(preview.image))
        assert image.width == image.height  # as the picture; ComfyUI enlarges it


def test_interrupt_ends_the_run_within_a_step_and_the_next_prompt_runs(server: ComfyServer, graph: Any) -> None:
    slow = graphs.changed(graph, **{"4.size.width": 384, "4.size.height": 384, "5.steps": 100, "5.seed": 102})
    first = server.queue(slow)
    following = server.queue(graphs.changed(graph, **{"5.seed": 103}))
    steps: list[int] = []

    def interrupt_at_two(event: Event) -> None:
        if event.type == "progress":
            steps.append(event.data["value"])
            if event.data["value"] == 2:
                server.interrupt()

    with pytest.raises(Interrupted) as stopped:
        server.wait(first, on_event=interrupt_at_two)
    assert stopped.value.node_type == "LongCatSampler"
    assert max(steps) <= 3
    assert server.wait(following).status == "success"


def test_the_same_prompt_is_cached_and_a_new_seed_reloads_nothing(server: ComfyServer, graph: Any) -> None:
    graph = graphs.changed(graph, **{"5.seed": 104})
    server.run(graph)
    assert server.run(graph).executed_nodes == []
    again = server.run(graphs.changed(graph, **{"5.seed": 105}))
    assert set(again.executed_nodes) == {"5", "6", "7"}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_precision_draws(server: ComfyServer, graph: Any, engine: str) -> None:
    exact = picture(server, graphs.changed(graph, **{"1.engine": engine, "1.engine.precision": "fp32"}))
    for precision in ("bf16", "fp16"):
        settings = {"1.engine": engine, "1.engine.precision": precision, "1.text_encoder_precision": precision}
        drawn = picture(server, graphs.changed(graph, **settings))
        assert not np.array_equal(drawn, exact)  # the precision took
        assert np.abs(drawn.astype(int) - exact.astype(int)).mean() <= 8


def test_cores_lora_loader_applies_to_the_core_engine(server: ComfyServer, graph: Any) -> None:
    torch.manual_seed(0)
    lora = {}
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"):
        rows = 128 if name.endswith("to_q") else 512
        lora[f"transformer.{name}.lora_A.weight"] = torch.randn(4, 128)
        lora[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4)
    folder = server.base_dir / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.safetensors").write_bytes(save(lora))
    graph = graphs.changed(graph, **{"1.engine": "core"})
    plain = graphs.saved_latent(server, graph, "5")
    logged = len(server.log_text())
    graph["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["1", 0], "lora_name": "test.safetensors", "strength_model": 0.0},
    }
    graph["5"]["inputs"]["model"] = ["lora", 0]
    assert torch.equal(graphs.saved_latent(server, graph, "5"), plain)
    changed = graphs.saved_latent(server, graphs.changed(graph, **{"lora.strength_model": 0.2}), "5")
    assert (changed - plain).norm() / plain.norm() > 0.01
    assert "lora key not loaded" not in server.log_text()[logged:]
