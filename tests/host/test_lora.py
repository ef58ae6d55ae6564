"""LongCatLoraLoader and core's LoRA loaders on our MODEL, over a real server's API."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_loras import foreign
from safetensors.torch import save_file

from host import graphs
from longcat_pack.longcat_backend import checkpoints, transformer
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import NodeFailed

Load = Callable[[str], dict[str, Any]]
KINDS = [("core", "fp32"), ("core", "int8"), ("diffusers", "fp32"), ("diffusers", "int8-quanto")]
STRENGTH = 0.15


@pytest.fixture(scope="module")
def folder(server: ComfyServer) -> Iterator[Path]:
    """A folder of LoRAs of this module."""
    place = server.base_dir / "models" / "loras" / "of_test_lora"
    place.mkdir(parents=True, exist_ok=True)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def loras(folder: Path, pack_dir: Path) -> dict[str, str]:
    """The names of files of a few dialects, for all layers of LongCat-Tiny but the time embedding."""
    model = transformer.load_transformer(checkpoints.open_checkpoint(pack_dir / "demo" / "LongCat-Tiny"), torch.float32)
    names = {}
    for dialect in ("transformer, alpha tensors", "PEFT folder", "SimpleTuner comfyui"):
        path, _ = foreign(dialect, model.transformer, folder / dialect.split(",")[0], without="time_embed")
        names[dialect] = path.relative_to(folder.parent).as_posix()
    return names


@pytest.fixture
def graph(api_workflow: Load) -> dict[str, Any]:
    """Text to image in two steps, with a LoRA between loader and sampler and its report shown."""
    graph = graphs.changed(api_workflow("text_to_image"), **{"5.steps": 2, "5.model": ["lora", 0]})
    graph["lora"] = {"class_type": "LongCatLoraLoader", "inputs": {"model": ["1", 0], "lora": "", "strength": STRENGTH}}
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["lora", 1]}}
    return graph


def by_core(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with core's loader in the place of ours."""
    inputs = graph["lora"]["inputs"]
    copy = {key: node for key, node in graph.items() if key != "report"}
    copy["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": inputs["model"], "lora_name": inputs["lora"], "strength_model": inputs["strength"]},
    }
    return copy


def without_lora(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph without a LoRA."""
    plain = graphs.changed(graph, **{"5.model": ["1", 0]})
    return {key: node for key, node in plain.items() if key not in ("lora", "report")}


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_ours_and_cores_loader_draw_the_same_and_nothing_stays(
    engine: str, precision: str, server: ComfyServer, graph: Any, loras: dict[str, str]
) -> None:
    settings = {"1.engine": engine, "1.engine.precision": precision, "lora.lora": loras["transformer, alpha tensors"]}
    graph = graphs.changed(graph, **settings)
    base = graphs.saved_latent(server, without_lora(graph), "5")
    result = server.run(graphs.with_latent_saved(graph, "5"))
    ours = graphs.read_latent(server, result, "latent")
    assert (ours - base).norm() / base.norm() > 0.01
    report = result.outputs["report"]["text"][0]
    assert result.outputs["lora"]["text"][0] == report
    assert "diffusers (official names)" in report
    assert "82 layers matched, strength 0.15 匹配 82 层" in report
    assert "LoRA, rank 秩 3, alpha 1.5 (scale 缩放 0.5)" in report
    assert "alpha: 82 from the file's tensors" in report
    cores = graphs.saved_latent(server, by_core(graph), "5")
    assert (ours - cores).norm() / ours.norm() <= 1e-5
    off = graphs.saved_latent(server, graphs.changed(graph, **{"lora.strength": 0.0}), "5")
    assert torch.equal(off, base)
    server.free()  # ComfyUI unloads outside of the inference mode of nodes
    graph["again"] = {
        "class_type": "LongCatLoraLoader",
        "inputs": {"model": ["lora", 0], "lora": loras["PEFT folder"], "strength": -0.1},
    }
    stacked = graphs.saved_latent(server, graphs.changed(graph, **{"5.model": ["again", 0]}), "5")
    assert not torch.equal(stacked, ours)
    assert torch.equal(graphs.saved_latent(server, graph, "5"), ours)


@pytest.mark.parametrize("engine", ["core", "diffusers"])
def test_what_cores_loader_does_not_know_it_says(
    engine: str, server: ComfyServer, graph: Any, loras: dict[str, str]
) -> None:
    for dialect in ("PEFT folder", "SimpleTuner comfyui"):
        graph = graphs.changed(graph, **{"1.engine": engine, "lora.lora": loras[dialect]})
        assert "82 layers matched" in server.run(graph).outputs["report"]["text"][0]
        with pytest.raises(NodeFailed, match="found no layer of this model in the LoRA"):
            server.run(by_core(graph))


def test_bad_files_are_errors_of_the_node(server: ComfyServer, graph: Any, folder: Path) -> None:
    save_file({"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": torch.ones(2, 2)}, folder / "sdxl.safetensors")
    flux = {"transformer.single_transformer_blocks.37.proj_mlp.lora_A.weight": torch.ones(2, 128)}
    flux["transformer.single_transformer_blocks.37.proj_mlp.lora_B.weight"] = torch.ones(512, 2)
    save_file(flux, folder / "flux.safetensors")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "old.pt").write_bytes(b"\x80\x04N.")
    said = {
        "sdxl.safetensors": "None of the 1 keys",
        "flux.safetensors": "single_transformer_blocks.37.proj_mlp",
        "empty.safetensors": "is damaged",
        "old.pt": "is a pickle",
    }
    for name, message in said.items():
        with pytest.raises(NodeFailed, match=message) as error:
            server.run(graphs.changed(graph, **{"lora.lora": f"of_test_lora/{name}"}))
        assert error.value.node_type == "LongCatLoraLoader"
    assert server.run(without_lora(graph)).images


def test_a_file_that_changed_is_read_again(server: ComfyServer, graph: Any, folder: Path) -> None:
    name = "transformer.proj_out"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 128) * 0.01, f"{name}.lora_B.weight": torch.ones(64, 2)}
    path = folder / "changing.safetensors"
    save_file(tensors, path)
    graph = graphs.changed(graph, **{"lora.lora": "of_test_lora/changing.safetensors"})
    assert "rank 秩 2" in server.run(graph).outputs["report"]["text"][0]
    assert "lora" not in server.run(graph).executed_nodes
    tensors = {f"{name}.lora_A.weight": torch.ones(3, 128) * 0.01, f"{name}.lora_B.weight": torch.ones(64, 3)}
    save_file(tensors, path)
    assert "rank 秩 3" in server.run(graph).outputs["report"]["text"][0]
