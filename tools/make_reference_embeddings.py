"""Make the references of tests/parity: the embeddings of prompts and of edit instructions in the official stack.

Run it in an environment of its own, with the versions that LongCat-Image was published for, after the text encoder of
a demo checkpoint has changed:

    pip install torch torchvision transformers==4.57.1 diffusers==0.37.0 accelerate
    python tools/make_reference_embeddings.py

transformers 5 computes other text positions, so the tensors cannot be made by the environment of the tests.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from diffusers import LongCatImageEditPipeline, LongCatImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorFast,
)

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "demo" / "LongCat-Tiny"
EDIT_FOLDER = ROOT / "demo" / "LongCat-Tiny-Edit"
FIXTURE = ROOT / "tests" / "parity" / "reference_embeddings.safetensors"
EDIT_FIXTURE = FIXTURE.with_name("reference_edit_embeddings.safetensors")
OFFICIAL = "4.57.1"
PROMPTS = (
    "",
    "a small yellow circle at the top on a purple background",
    "蓝色背景中央有一颗大的红色星星",
    'a sign that says "A7" and 一块写着“五”的牌子, isn\'t it?',
    "red " * 600,
)
# Instructions with the size of the picture that the vision encoder sees.
EDITS = (
    ("", (64, 64)),
    ("make the circle yellow", (96, 64)),
    ("把背景改成蓝色", (56, 98)),
    ('write "A7" and “五” on it, don\'t move it', (73, 96)),
)


def load_encoder(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """An encoder with its config in the words of transformers 4: rope settings had another name and place."""
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    saved = load_file(folder / "text_encoder" / "model.safetensors")
    wanted = model.state_dict()
    renamed = {_name_in_4(key): value for key, value in saved.items()}
    if renamed.keys() != wanted.keys():
        raise SystemExit(f"keys differ: {sorted(renamed.keys() ^ wanted.keys())[:5]}")
    model.load_state_dict({key: value.float() for key, value in renamed.items()})
    return model.float().eval()


def _name_in_4(key: str) -> str:
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith("model.") and not key.startswith(("model.language_model.", "model.visual.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


def stand_in(pipeline: type, folder: Path, encoder: Any, **more: Any) -> SimpleNamespace:
    """As much of a pipeline as its ``_encode_prompt`` needs, with its own templates."""
    template = pipeline.__init__.__code__.co_consts
    # By class: the config that transformers 5 saves names no class that transformers 4 would find.
    return SimpleNamespace(
        tokenizer=Qwen2TokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json")),
        tokenizer_max_length=512,
        prompt_template_encode_prefix=next(c for c in template if str(c).startswith("<|im_start|>system")),
        prompt_template_encode_suffix=next(c for c in template if str(c).startswith("<|im_end|>")),
        device="cpu",
        text_encoder=encoder,
        **more,
    )


def picture(width: int, height: int) -> torch.Tensor:
    """A picture (height, width, 3) in uint8 with a gradient each way, a disc and some noise."""
    row = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    column = torch.linspace(-1, 1, width)[None].expand(height, width)
    disc = (row.square() + column.square() < 0.4).float()
    noise = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    return (torch.stack([row, column, disc + noise - 1], dim=-1) * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)


def edit_embeddings() -> dict[str, torch.Tensor]:
    """Pictures, and embeddings of their instructions up to the first pad, which all pads equal."""
    processor = Qwen2VLImageProcessorFast.from_pretrained(EDIT_FOLDER / "text_processor")
    more = {"image_processor_vl": processor, "image_token": "<|image_pad|>"}
    pipe = stand_in(LongCatImageEditPipeline, EDIT_FOLDER, load_encoder(EDIT_FOLDER), **more)
    tensors = {}
    for index, (prompt, size) in enumerate(EDITS):
        pixels = picture(*size)
        embeddings = LongCatImageEditPipeline._encode_prompt(pipe, [prompt], Image.fromarray(pixels.numpy()))[0]
        same = (embeddings - embeddings[-1]).abs().amax(-1) < 1e-6
        pads = int(same.flip(0).long().cumprod(0).sum())
        tensors[f"{index}.picture"] = pixels
        tensors[f"{index}.embeddings"] = embeddings[: len(embeddings) - max(pads - 1, 0)].contiguous()
    return tensors


def main() -> None:
    """Encode the prompts as the pipelines do and save the embeddings of each."""
    if transformers.__version__ != OFFICIAL:
        raise SystemExit(f"this needs transformers {OFFICIAL}, found {transformers.__version__}")
    pipe = stand_in(LongCatImagePipeline, FOLDER, load_encoder(FOLDER))
    with torch.no_grad():
        tensors = {
            str(i): LongCatImagePipeline._encode_prompt(pipe, [p])[0].contiguous() for i, p in enumerate(PROMPTS)
        }
        edits = edit_embeddings()
    save_file(tensors, FIXTURE, metadata={"prompts": json.dumps(PROMPTS), "transformers": OFFICIAL})
    prompts = json.dumps([prompt for prompt, _ in EDITS])
    save_file(edits, EDIT_FIXTURE, metadata={"prompts": prompts, "transformers": OFFICIAL})
    for path in (FIXTURE, EDIT_FIXTURE):
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
