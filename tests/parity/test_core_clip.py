"""ComfyUI's own CLIP in LongCatEditEncode gives the official conditioning: compared with ours on the same weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from longcat_pack.longcat_backend import checkpoints, official, text_encoder, vision
from longcat_pack.longcat_backend.errors import LongCatError

TOLERANCE = 1e-5
# ComfyUI's class has fixed heads of 128 channels and Qwen2.5's vocabulary; the rest can be made small.
TEXT = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
DEPTH = 9  # the eighth block is the first that attends across windows
CONFIG: dict[str, Any] = {
    **official.TEXT_ENCODER,
    **TEXT,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vision_config": {**official.TEXT_ENCODER["vision_config"], **TOWER, "depth": DEPTH, "out_hidden_size": 128},
}
PROMPTS = ("把「圆」改成红色, don't keep it's 'A7'", "", "red " * 600)
IMAGE_SIZES = ((100, 150), (640, 416))


@pytest.fixture(scope="module")
def folder_with_small_encoder(pack_dir: Path, comfy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a random encoder of the published architecture, and Qwen2.5's tokenizer."""
    from longcat_pack.longcat_backend.comfy_bridge import files

    folder = tmp_path_factory.mktemp("models") / "Small-Edit"
    shutil.copytree(pack_dir / "demo" / "LongCat-Tiny", folder)
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(files.tokenizer_folder(), folder / "tokenizer")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / "text_processor" / name).unlink()
    (folder / "text_processor" / "preprocessor_config.json").write_text(json.dumps(dict(official.PROCESSOR)))
    (folder / "text_encoder" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    parts = {
        "model.": text_encoder.empty_text_model(CONFIG).state_dict(),
        "visual.": vision.empty_tower(CONFIG).state_dict(),
    }
    weights = {
        prefix + name: torch.randn(value.shape, generator=generator) * (0.02 if value.ndim > 1 else 0.2)
        for prefix, state in parts.items()
        for name, value in state.items()
    }
    weights |= {key: value + 1 for key, value in weights.items() if "norm" in key and key.endswith("weight")}
    save_file(weights, folder / "text_encoder" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def ours(folder_with_small_encoder: Path) -> Any:
    from longcat_pack.longcat_backend.comfy_bridge import loading

    return loading.load_encoder(checkpoints.open_checkpoint(folder_with_small_encoder), "fp32")


@pytest.fixture(scope="module")
def core(folder_with_small_encoder: Path) -> Any:
    """What CLIPLoader makes with type longcat_image, in the small size."""
    import comfy.ops
    import comfy.sd
    import comfy.text_encoders.longcat_image as core_longcat
    from comfy.text_encoders.qwen_vl import Qwen2VLVisionTransformer

    target = SimpleNamespace(
        clip=core_longcat.te(dtype_llama=torch.float32), tokenizer=core_longcat.LongCatImageTokenizer, params={}
    )
    small = {**TEXT, "num_attention_heads": 1, "num_key_value_heads": 1}
    clip = comfy.sd.CLIP(target, model_options={"qwen25_7b_model_config": small}, disable_dynamic=True)
    encoder = clip.cond_stage_model.qwen25_7b.transformer
    encoder.visual = Qwen2VLVisionTransformer(
        **TOWER, output_hidden_size=128, num_layers=DEPTH, dtype=torch.float32, ops=comfy.ops.manual_cast
    )
    weights = load_file(folder_with_small_encoder / "text_encoder" / "model.safetensors")
    missing, unexpected = clip.load_sd(weights)
    assert not missing and not unexpected
    return clip


@pytest.fixture(scope="module")
def vae(pack_dir: Path, comfy_dir: Path) -> Any:
    from longcat_pack.longcat_backend.comfy_bridge import vae as bridge

    return bridge.load(checkpoints.open_checkpoint(pack_dir / "demo" / "LongCat-Tiny"))


def image(width: int, height: int, count: int = 1) -> torch.Tensor:
    def one(seed: int) -> torch.Tensor:
        blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        sized = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(sized).astype(np.float32) / 255)

    return torch.stack([one(seed) for seed in range(count)])


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", IMAGE_SIZES, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["quotes", "empty", "cut"])
@torch.inference_mode()
def test_cores_clip_gives_the_same_conditioning(
    prompt: str, size: tuple[int, int], ours: Any, core: Any, vae: Any
) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing

    given = (vae, image(*size), prompt, "", (160, 112), True)
    expected, _, _, report = editing.encode(ours, *given)
    found, _, latent, found_report = editing.encode(core, *given)
    assert found_report == report
    assert found[0][0].shape == expected[0][0].shape
    assert relative_error(found[0][0], expected[0][0]) <= TOLERANCE
    assert "attention_mask" not in found[0][1]
    assert torch.equal(found[0][1]["reference_latents"][0], latent["samples"])


@torch.inference_mode()
def test_cores_clip_edits_a_batch(ours: Any, core: Any, vae: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import editing

    given = (vae, image(64, 64, 2), "red", "", (64, 64))
    expected, found = (editing.encode(clip, *given)[0][0][0] for clip in (ours, core))
    assert found.shape[0] == 2 and relative_error(found, expected) <= TOLERANCE
    assert relative_error(found[:1], found[1:]) > 1e-3


def test_cores_clip_draws_from_text_with_cores_node(core: Any) -> None:
    from longcat_pack.longcat_backend.comfy_bridge import clip as bridge

    with pytest.raises(LongCatError, match="LongCatTextEncode needs the CLIP of LongCatLoader.*use CLIPTextEncode"):
        bridge.encode(core, "a red circle")
