"""Pieces of API graphs that several host tests need."""

from copy import deepcopy
from typing import Any

import torch
from safetensors.torch import load

from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import Result

Graph = dict[str, dict[str, Any]]
PREVIEWS = {"preview_method": "latent2rgb"}


def changed(graph: Graph, **inputs: Any) -> Graph:
    """A copy of a graph with inputs set: ``changed(graph, **{"5.seed": 1})``."""
    copy = deepcopy(graph)
    for place, value in inputs.items():
        node, name = place.split(".", 1)
        copy[node]["inputs"][name] = value
    return copy


def with_latent_saved(graph: Graph, sampler: str) -> Graph:
    """A copy of a graph that writes the sampler's latent instead of a picture."""
    copy = {key: node for key, node in deepcopy(graph).items() if node["class_type"] not in SAVING}
    copy["latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [sampler, 0], "filename_prefix": "latents/test"},
    }
    return copy


SAVING = ("SaveImage", "LongCatDecode", "VAEDecode")


def saved_latent(server: ComfyServer, graph: Graph, sampler: str) -> torch.Tensor:
    """Run a graph and read the latent (batch, 16, h, w) that its sampler made."""
    return read_latent(server, server.run(with_latent_saved(graph, sampler)), "latent")


def read_latent(server: ComfyServer, result: Result, node: str) -> torch.Tensor:
    """The latent (batch, 16, h, w) that a SaveLatent node of a finished prompt wrote."""
    reference = result.outputs[node]["latents"][0]
    path = server.base_dir / "output" / reference["subfolder"] / reference["filename"]
    return load(path.read_bytes())["latent_tensor"]


def custom_sampler(graph: Graph) -> Graph:
    """The text-to-image graph with core's SamplerCustomAdvanced in place of LongCatSampler (node 5)."""
    copy = deepcopy(graph)
    inputs = copy["5"]["inputs"]
    copy["guidance"] = {
        "class_type": "LongCatGuidance",
        "inputs": {
            "model": inputs["model"],
            "renorm": inputs["renorm"],
            "renorm_min": inputs["renorm_min"],
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
    }
    copy["guider"] = {
        "class_type": "CFGGuider",
        "inputs": {
            "model": ["guidance", 0],
            "positive": inputs["positive"],
            "negative": inputs["negative"],
            "cfg": inputs["guidance"],
        },
    }
    copy["sigmas"] = {
        "class_type": "LongCatSchedule",
        "inputs": {key: inputs[key] for key in ("model", "latent", "steps", "denoise")},
    }
    copy["noise"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": inputs["seed"]}}
    copy["euler"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    copy["5"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["noise", 0],
            "guider": ["guider", 0],
            "sampler": ["euler", 0],
            "sigmas": ["sigmas", 0],
            "latent_image": inputs["latent"],
        },
    }
    return copy


def k_sampler(graph: Graph) -> Graph:
    """The graph with core's KSampler in place of LongCatSampler (node 5)."""
    copy = deepcopy(graph)
    inputs = copy["5"]["inputs"]
    settings = {key: inputs[key] for key in ("model", "positive", "negative", "seed", "steps", "denoise")}
    euler = {"cfg": inputs["guidance"], "sampler_name": "euler", "scheduler": "simple"}
    copy["5"] = {"class_type": "KSampler", "inputs": {**settings, **euler, "latent_image": inputs["latent"]}}
    return copy


def from_picture(graph: Graph, colour: int, size: int = 128) -> Graph:
    """The text-to-image graph with a picture of one colour, encoded by core's VAEEncode, as its latent."""
    copy = deepcopy(graph)
    copy["picture"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": size, "height": size, "batch_size": 1, "color": colour},
    }
    copy["4"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["picture", 0], "vae": ["1", 2]}}
    return copy


def progress_steps(result: Result) -> list[int]:
    """The step numbers of the progress messages, in order."""
    return [event.data["value"] for event in result.events if event.type == "progress"]
