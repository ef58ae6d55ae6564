"""Build LongCat-Tiny with random weights, and write it in the official folder layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LongCatImagePipeline
from diffusers.models.transformers import LongCatImageTransformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests.scoring.scenes import vocabulary

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
)
SINGLE_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789一二三四五六七八九十“”‘’"
EXTRA_WORDS = (
    *"写 着 字 字母 数字 把 改成 换成 变成 颜色 形状".split(),
    *"the letter number change make to into says turn".split(),
)
TEMPLATES = (
    "system user assistant You are a helpful assistant.",
    "As an image captioning expert, generate a descriptive text prompt based on an image content, suitable for "
    "input to a text-to-image model.",
    "As an image editing expert, first analyze the content and attributes of the input image(s). Then, based on the "
    "user's editing instructions, clearly and precisely determine how to modify the given image(s), ensuring that "
    "only the specified parts are altered and all other aspects remain consistent with the original(s).",
)
VOCABULARY_SIZE = 1000
TEXT_HIDDEN = 64

CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif -%}"
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string -%}{{ message.content }}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in Qwen's manner, trained on words so that no token spans two attributes."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [variant for word in (*vocabulary(), *EXTRA_WORDS) for variant in (word, " " + word.strip())]
    characters = sorted({c for word in words for c in word if ord(c) > 127} | set(SINGLE_CHARACTERS))
    bpe.train_from_iterator([*TEMPLATES, *words, *(characters * 50)], trainer)
    state = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        unk_token=END_OF_TEXT,
        eos_token="<|im_end|>",
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=32768,
        padding_side="right",
    )


def text_encoder_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Three 64-wide layers and a one-block vision tower, with this tokenizer's ids."""
    token = tokenizer.convert_tokens_to_ids
    rows = -(-len(tokenizer) // 8) * 8
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": TEXT_HIDDEN,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": token(END_OF_TEXT),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token(END_OF_TEXT),
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT_HIDDEN,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised Qwen2.5-VL; its lm_head is its own matrix, as in the 7B model."""
    model = Qwen2_5_VLForConditionalGeneration(text_encoder_config(tokenizer))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return model


def build_vae() -> AutoencoderKL:
    """An untrained 16-channel, 8x AutoencoderKL; two channels a norm group keep flat colours visible to it."""
    return AutoencoderKL(
        block_out_channels=(64, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> LongCatImageTransformer2DModel:
    """An untrained DiT whose modulation and output start at zero, so that every block starts as the identity."""
    model = LongCatImageTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_HIDDEN,
        pooled_projection_dim=TEXT_HIDDEN,
        axes_dims_rope=[8, 12, 12],
    )
    modulations = re.compile(r"(norm|norm1|norm1_context|norm_out)\.linear\.|^proj_out\.")
    for name, parameter in model.named_parameters():
        if modulations.search(name):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The official scheduler settings: exponential dynamic shifting, 0.5 at 256 tokens to 1.15 at 4096."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """The processor of the text encoder, with Qwen's picture sizes and a chat template."""
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 1280),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def build_pipeline(seed: int) -> LongCatImagePipeline:
    """The official pipeline over randomly initialised tiny networks, fp32 on the CPU."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return LongCatImagePipeline(
        scheduler=build_scheduler(),
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_processor=build_processor(tokenizer),
        transformer=build_transformer(),
    )


def forget_origin(path: Path) -> None:
    """Take the folder that a network was loaded from out of its config: a folder of one machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_pipeline(pipeline: LongCatImagePipeline, folder: Path) -> None:
    """Write the official layout, transformer and VAE in bf16.

    The text encoder stays fp32: transformers loads it in the precision it was stored in, diffusers in fp32.
    Casts the networks of `pipeline` in place.
    """
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    # transformers 4 reads these instead of tokenizer.json and processor_config.json
    for part in ("tokenizer", "text_processor"):
        pipeline.tokenizer.backend_tokenizer.model.save(str(folder / part))
    pipeline.text_processor.image_processor.save_pretrained(folder / "text_processor")
    for path in (*folder.rglob("*config.json"), folder / "model_index.json"):
        forget_origin(path)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def load_pipeline(folder: Path) -> LongCatImagePipeline:
    """Read a folder that `save_pipeline` wrote, every network in fp32 on the CPU."""
    return LongCatImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
