"""An official LongCat-Image folder with random bf16 weights: the published sizes, and pictures of noise."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LongCatImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

DEMO = Path(__file__).resolve().parents[2] / "demo" / "LongCat-Tiny"
TRANSFORMER = {"num_layers": 10, "num_single_layers": 20}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
# Qwen2.5-VL-7B's decoder; the tokenizer stays the demo's, whose tokens are all below the vocabulary's end.
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "layer_types": ["full_attention"] * 28,
    "max_window_layers": 28,
}
SEED = 42


def build(folder: Path, device: str = "cuda") -> None:
    """Write the folder, 29 GB; the vision tower, which text to image does not use, is the demo's small one."""
    folder.mkdir(parents=True)
    for part in ("scheduler", "tokenizer", "text_processor"):
        shutil.copytree(DEMO / part, folder / part)
    shutil.copy(DEMO / "model_index.json", folder)
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            _save(LongCatImageTransformer2DModel(**TRANSFORMER), folder / "transformer")
            _save(AutoencoderKL.from_config({**_demo_config("vae"), **VAE}), folder / "vae")
            _save(Qwen2_5_VLForConditionalGeneration(_encoder_config()), folder / "text_encoder")
    finally:
        torch.set_default_dtype(torch.float32)


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _encoder_config() -> Qwen2_5_VLConfig:
    config = _demo_config("text_encoder")
    config["text_config"].update(TEXT)
    config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config["vision_config"]["out_hidden_size"] = TEXT["hidden_size"]
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    return Qwen2_5_VLConfig.from_dict(config)


def _demo_config(part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((DEMO / part / "config.json").read_text(encoding="utf-8"))
    return config
