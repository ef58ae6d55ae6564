"""Make tests/parity/reference_embeddings.safetensors: the prompt embeddings of the official software stack.

Run it in an environment of its own, with the versions that LongCat-Image was published for, after the demo
checkpoint's text encoder has changed:

    pip install torch transformers==4.57.1 diffusers==0.37.0 accelerate
    python tools/make_reference_embeddings.py

transformers 5 computes other text positions, so the tensors cannot be made by the environment of the tests.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from diffusers import LongCatImagePipeline
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "demo" / "LongCat-Tiny"
FIXTURE = ROOT / "tests" / "parity" / "reference_embeddings.safetensors"
OFFICIAL = "4.57.1"
PROMPTS = (
    "",
    "a small yellow circle at the top on a purple background",
    "蓝色背景中央有一颗大的红色星星",
    'a sign that says "A7" and 一块写着“五”的牌子, isn\'t it?',
    "red " * 600,
)


def load_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """The encoder with its config in the words of transformers 4: rope settings had another name and place."""
    config = json.loads((FOLDER / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config))
    saved = load_file(FOLDER / "text_encoder" / "model.safetensors")
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


def main() -> None:
    """Encode the prompts as the pipeline does and save all 512 embeddings of each."""
    if transformers.__version__ != OFFICIAL:
        raise SystemExit(f"this needs transformers {OFFICIAL}, found {transformers.__version__}")
    # By class: the config that transformers 5 saves names no class that transformers 4 would find.
    tokenizer = Qwen2TokenizerFast(tokenizer_file=str(FOLDER / "tokenizer" / "tokenizer.json"))
    template = LongCatImagePipeline.__init__.__code__.co_consts
    stand_in = SimpleNamespace(
        tokenizer=tokenizer,
        tokenizer_max_length=512,
        prompt_template_encode_prefix=next(c for c in template if str(c).startswith("<|im_start|>system")),
        prompt_template_encode_suffix=next(c for c in template if str(c).startswith("<|im_end|>")),
        device="cpu",
        text_encoder=load_encoder(),
    )
    tensors = {}
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            tensors[str(index)] = LongCatImagePipeline._encode_prompt(stand_in, [prompt])[0].contiguous()
    save_file(tensors, FIXTURE, metadata={"prompts": json.dumps(PROMPTS), "transformers": OFFICIAL})
    print(f"wrote {FIXTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
