"""Bad values, latents, prompts and sockets: a sentence in both languages, and a server that goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from host.bad_input import GOOD, Graph, check_alive, check_sentence, failed, prompt, rejected
from longcat_pack.tools.host import ComfyServer
from longcat_pack.tools.results import PromptRejected

OLD_VERSION = "0.29.9"
Bring = Callable[[torch.Tensor], Graph]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("4.size.width", 1000, ("width 1000", "992 / 1008", "宽度 1000")),
        ("4.size.height", 1001, ("height 1001", "992 / 1008", "高度 1001")),
        ("4.size.width", 0, ("width 0", "16 / 32")),
        ("4.size.width", -64, ("width -64", "16 / 32")),
        ("4.size.height", 8192, ("height 8192", "Use 4096")),
        ("4.size", "gigantic", ("There is no such size", "1:1 (1024x1024)", "custom")),
        ("4.size", {"size": "custom"}, ("There is no such size",)),
        ("4.batch_size", 0, ("batch_size is 0", "between 1 and 64")),
        ("4.batch_size", 65, ("batch_size is 65",)),
        ("5.steps", 0, ("steps is 0", "between 1 and 1000")),
        ("5.steps", 10**9, ("steps is 1000000000",)),
        ("5.denoise", 1e-9, ("denoise is 1e-09",)),
        ("5.denoise", "nan", ("denoise is nan",)),
        ("5.denoise", 2, ("denoise is 2",)),
        ("1.engine", "warp", ("There is no such engine", "core", "diffusers")),
        ("1.engine", None, ("There is no such engine",)),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_before_the_queue(
    place: str, value: Any, words: tuple[str, ...], server: ComfyServer
) -> None:
    rejected(server, prompt(**{place: value}), place[0], words)


@pytest.mark.parametrize(
    "change",
    [
        {"1.engine.precision": "fp64"},
        {"1.text_encoder_precision": "int2"},
        {"5.seed": -1},
        {"5.guidance": -1},
        {"4.batch_size": "many"},
        {"5.model": ["1", 1]},
        {"5.latent": ["99", 0]},
        {"6.tiled": ["1", 7]},
    ],
    ids=str,
)
def test_what_the_host_checks_is_refused_and_the_server_goes_on(change: dict[str, Any], server: ComfyServer) -> None:
    with pytest.raises(PromptRejected):
        server.queue(prompt(**change))
    check_alive(server)


@pytest.fixture
def latent(server: ComfyServer) -> Bring:
    """A graph that brings a tensor into the server as a LATENT, at node "latent"."""

    def bring(samples: torch.Tensor) -> Graph:
        path = server.base_dir / "input" / "test.latent"
        save_file({"latent_tensor": samples.contiguous(), "latent_format_version_0": torch.tensor([])}, path)
        graph = prompt()
        graph["latent"] = {"class_type": "LoadLatent", "inputs": {"latent": path.name}}
        return graph

    return bring


def ones_with(value: float) -> torch.Tensor:
    samples = torch.ones(1, 16, 16, 16)
    samples[0, 3, 2, 1] = value
    return samples


FOREIGN = {
    "packed": (torch.ones(1, 64, 64), "(1, 64, 64)"),
    "another model's": (torch.ones(1, 4, 16, 16), "(1, 4, 16, 16)"),
    "video": (torch.ones(1, 16, 2, 16, 16), "(1, 16, 2, 16, 16)"),
    "no batch": (torch.zeros(0, 16, 16, 16), "(0, 16, 16, 16)"),
    "no height": (torch.zeros(1, 16, 0, 16), "(1, 16, 0, 16)"),
    "flat": (torch.ones(16), "(16,)"),
}


@pytest.mark.parametrize("node", ["5", "6"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_latent_that_is_not_finite_is_refused(node: str, value: float, server: ComfyServer, latent: Bring) -> None:
    graph = latent(ones_with(value))
    graph[node]["inputs"]["latent"] = ["latent", 0]
    failed(server, graph, node, ("1 values", "NaN", "fp32"))


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_latent_is_refused_by_the_sampler(kind: str, server: ComfyServer, latent: Bring) -> None:
    samples, shape = FOREIGN[kind]
    graph = latent(samples)
    graph["5"]["inputs"]["latent"] = ["latent", 0]
    failed(server, graph, "5", (shape, "(batch, 16", "LongCatEmptyLatent"))


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if kind != "packed"])
def test_a_foreign_latent_is_refused_by_decode(kind: str, server: ComfyServer, latent: Bring) -> None:
    samples, shape = FOREIGN[kind]
    graph = latent(samples)
    graph["6"]["inputs"]["latent"] = ["latent", 0]
    failed(server, graph, "6", (shape, "(batch, 16", "LongCatEmptyLatent"))


@pytest.mark.parametrize(
    ("shape", "width", "height", "words"),
    [
        ((1, 64, 64), 128, 256, ("128x256", "(128, 64)")),
        ((1, 64, 64), 128, 0, ("height 0", "16 / 32")),
        ((1, 64, 64), 136, 128, ("width 136", "128 / 144")),
        ((1, 60, 64), 0, 0, ("128x128", "(64, 64)")),
        ((1, 64, 48), 128, 128, ("(1, 64, 48)", "(64, 64)")),
    ],
    ids=str,
)
def test_packed_latents_must_fit_the_size(
    shape: tuple[int, ...], width: int, height: int, words: tuple[str, ...], server: ComfyServer, latent: Bring
) -> None:
    graph = latent(torch.zeros(shape))
    graph["6"]["inputs"].update(latent=["latent", 0], width=width, height=height)
    failed(server, graph, "6", words)


def test_an_offload_that_there_is_not_ends_in_a_sentence(server: ComfyServer) -> None:
    """ComfyUI leaves the input out, which would mean auto."""
    failed(
        server, prompt(**{"1.offload": "warp"}), "1", ("There is no offload 'warp'", "group offload", "没有卸载方式")
    )


def test_guidance_that_is_no_number_ends_in_a_sentence(server: ComfyServer) -> None:
    failed(server, prompt(**{"5.guidance": "nan"}), "6", ("NaN",))


def test_an_empty_prompt_runs(server: ComfyServer) -> None:
    assert "tokens 词元: 0 / 512" in report(server, "")


def test_a_long_prompt_runs_and_says_what_was_cut(server: ComfyServer) -> None:
    words = "a red circle beside a blue square, "
    text = (words * 400)[:9_960] + " the very last words of this prompt here"
    assert len(text) == 10_000
    said = report(server, text)
    assert "tokens 词元: 512 / 512" in said
    assert "CUT 已截断" in said and said.rstrip().endswith("the very last words of this prompt here")


@pytest.mark.parametrize(
    "text",
    ["a" * 200_000, "“" * 5_000, "'" * 5_001, "red\0star", "<|im_end|><|im_start|>", "\u202e\ufeff😀" * 50, "(star:9)"],
    ids=["letters", "quotes", "apostrophes", "nul", "template", "signs", "weight"],
)
def test_odd_prompts_run(text: str, server: ComfyServer) -> None:
    assert "tokens 词元" in report(server, text)


def test_half_a_character_is_refused(server: ComfyServer) -> None:
    # What is left of an emoji that a program cut in two.
    failed(server, prompt(**{"2.prompt": "a star \ud83d"}), "2", ("U+D83D",))


def test_text_that_would_not_be_read_is_warned_about_and_quotes_can_be_normalised(server: ComfyServer) -> None:
    text = "a shop sign that says OPEN, 海报《春天》"
    said = report(server, text)
    assert "quoted text, encoded character by character 引号文字（逐字编码）: none 无" in said
    assert "NOT QUOTED 未加引号" in said and "“OPEN”" in said
    assert "UNKNOWN QUOTES 未训练的引号" in said and "a shop sign that says OPEN, 海报“春天”" in said
    assert "LongCatTextEncode: UNKNOWN QUOTES" in server.log_text()

    said = report(server, text, normalise_quotes=True)
    assert "（逐字编码）: “春天”" in said
    assert "实际编码的提示词: a shop sign that says OPEN, 海报“春天”" in said
    assert "NOT QUOTED" in said and "UNKNOWN QUOTES" not in said


def report(server: ComfyServer, text: str, **inputs: Any) -> str:
    """The report of LongCatTextEncode for a prompt that is drawn as well."""
    graph = prompt(**{"2.prompt": text, **{f"2.{name}": value for name, value in inputs.items()}})
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}
    result = server.run(graph)
    assert result.images
    said: str = result.outputs["report"]["text"][0]
    return said


@pytest.fixture
def foreign_model(server: ComfyServer) -> str:
    """The smallest file that ComfyUI takes for Stable Diffusion 3; most of its weights stay random."""
    path = server.base_dir / "models" / "diffusion_models" / "other.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {
        "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2),
        "joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(192, 64),
        "context_embedder.weight": torch.zeros(64, 4096),
        "y_embedder.mlp.0.weight": torch.zeros(64, 2048),
        "final_layer.linear.weight": torch.zeros(64, 64),
        "pos_embed": torch.zeros(1, 16, 64),
    }
    save_file(weights, path)
    return path.name


@pytest.mark.parametrize("node_type", ["LongCatSchedule", "LongCatGuidance", "LongCatSampler"])
def test_another_model_is_refused(node_type: str, server: ComfyServer, foreign_model: str) -> None:
    graph = prompt()
    graph["other"] = {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": foreign_model, "weight_dtype": "default"},
    }
    inputs: dict[str, Any] = {
        "LongCatSchedule": {"latent": ["4", 0], "steps": 1, "denoise": 1.0},
        "LongCatGuidance": {"renorm": True, "renorm_min": 0.0, "start_percent": 0.0, "end_percent": 1.0},
        "LongCatSampler": graph["5"]["inputs"],
    }[node_type]
    graph["5"] = {"class_type": node_type, "inputs": {**inputs, "model": ["other", 0]}}
    graph["6"] = {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}}
    del graph["7"]
    failed(server, graph, "5", ("SD3", "LongCatLoader"))


def test_another_clip_is_refused(server: ComfyServer) -> None:
    # ComfyUI makes CLIP-L of a file that it does not know.
    path = server.base_dir / "models" / "text_encoders" / "other.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"surplus": torch.zeros(1)}, path)
    graph = prompt(**{"2.clip": ["other", 0]})
    inputs = {"clip_name": path.name, "type": "stable_diffusion", "device": "cpu"}
    graph["other"] = {"class_type": "CLIPLoader", "inputs": inputs}
    failed(server, graph, "2", ("SD1Tokenizer", "CLIPTextEncode", "LongCatLoader"))


def test_another_vae_is_refused(server: ComfyServer) -> None:
    graph = prompt(**{"6.vae": ["other", 0]})
    graph["other"] = {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}}
    failed(server, graph, "6", ("(1, 16, 8, 8)", "(batch, 3,"))


def test_an_older_host_gets_a_sentence_and_no_nodes(comfy_dir: Path, pack_dir: Path, tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    for entry in comfy_dir.iterdir():
        # Python looks for modules beside the file that a linked main.py points to, so files are copied.
        if entry.is_dir():
            (host / entry.name).symlink_to(entry, target_is_directory=True)
        else:
            shutil.copy(entry, host)
    (host / "comfyui_version.py").write_text(f'__version__ = "{OLD_VERSION}"\n', encoding="utf-8")
    with ComfyServer(host, tmp_path / "base", pack_dir, args=["--cpu"]) as server:
        stats = json.loads(server.get("/system_stats"))
        assert stats["system"]["comfyui_version"] == OLD_VERSION
        nodes = server.object_info()
        assert "KSampler" in nodes
        assert not [name for name in nodes if name.startswith("LongCat")]
        with pytest.raises(PromptRejected, match="LongCat Loader"):
            server.queue(GOOD)
        lines = [line for line in server.log_text().splitlines() if "LongCat-Image" in line]
        check_sentence("\n".join(lines), (OLD_VERSION, "0.30.0", "Update ComfyUI"))
