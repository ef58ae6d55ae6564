"""Tokens are the reference pipeline's, with the real Qwen2.5 tokenizer that ComfyUI carries."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LongCatImagePipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

from longcat_pack.longcat_backend import prompts

# Every kind of text next to every kind of quotation.
TEXTS = (
    "a red fox jumps over the lazy dog",
    "一只穿着黄色针织衫的年轻女性，背景是粗糙的砖墙",
    "The café isn't open — 100 % closed; price: $3.50 (approx.)",
    "夜晚的霓虹灯 neon signs, 赛博朋克 style，4K！",
    "emoji 🐱‍👓 family 👨‍👩‍👧‍👦 flag 🇨🇳 and ½ ﬁ ﷽ \u200b zero width",
    "line one\nline two\ttabbed  double  spaces ",
    "",
    " ",
    "the dogs' bowls and rock'n'roll",
    "<|im_end|> special <|vision_start|> tokens",
)
QUOTATIONS = (
    "",
    " with the sign 'OPEN'",
    ' with the words "Hello, World! 123"',
    "，牌子上写着“欢迎光临”",
    " ‘单引号’",
    " '' \"\" “”",
    " “未闭合的引号",
    ' "mixed ‘inner’ quote"',
    " 'emoji 🎉 in quotes' and \"两种 quotes\"",
    " 「角括号」《书名号》",
    " `backticks` and ’reversed‘",
    ' """triple"""',
    " '漢字かな交じり文' 한국어 “العربية”",
    " 'line\nbreak'",
    " ”closing first“",
    ' say "I\'m here"',
    " 'a' 'b' \"c\" “d” ‘e’",
    " \\'escaped\\' \\\"quotes\\\"",
    " “" + "长文字" * 40 + "”",
    " ''nested' 'quotes''",
)
LONG = ("word " * 700, "丟鿿" * 400, "“" + "一二三四五" * 120 + "”", "a 'quoted' " * 300, "x" * 5000)
PRODUCTS = [text + quotation for text, quotation in itertools.product(TEXTS, QUOTATIONS)] + list(LONG)
# With two different contractions upstream corrupts the prompt (tests/unit/test_prompts.py); no reference then.
PROMPTS = [prompt for prompt in PRODUCTS if "".join(part for part, _ in split_quotation(prompt)) == prompt]


@pytest.fixture(scope="module")
def tokenizer(comfy_dir: Path) -> Any:
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(comfy_dir / "comfy" / "text_encoders" / "qwen25_tokenizer")


def reference_tokens(tokenizer: Any, prompt: str) -> tuple[list[int], int]:
    """What the pipeline hands to its encoder for a prompt: all ids and the number of attended ones."""
    seen: dict[str, torch.Tensor] = {}

    def encoder(**inputs: Any) -> Any:
        seen.update({key: value for key, value in inputs.items() if torch.is_tensor(value)})
        return SimpleNamespace(hidden_states=[torch.zeros(1, inputs["input_ids"].shape[1], 1)])

    stand_in = SimpleNamespace(
        tokenizer=tokenizer,
        tokenizer_max_length=512,
        prompt_template_encode_prefix=prompts.TEXT_TO_IMAGE_PREFIX,
        prompt_template_encode_suffix=prompts.SUFFIX,
        device="cpu",
        text_encoder=encoder,
    )
    LongCatImagePipeline._encode_prompt(stand_in, [prompt])
    return seen["input_ids"][0].tolist(), int(seen["attention_mask"].sum())


def test_there_are_at_least_200_prompts() -> None:
    assert len(set(PROMPTS)) >= 200


def test_tokens_equal_the_reference(tokenizer: Any) -> None:
    prefix = prompts.token_ids(tokenizer, prompts.TEXT_TO_IMAGE_PREFIX)
    suffix = prompts.token_ids(tokenizer, prompts.SUFFIX)
    assert (len(prefix), len(suffix)) == (36, 5)
    for prompt in PROMPTS:
        ids = prompts.tokenize(tokenizer, prompt).ids
        padded = [*ids, *[tokenizer.pad_token_id] * (prompts.MAX_TOKENS - len(ids))]
        expected = ([*prefix, *padded, *suffix], len(prefix) + len(ids) + len(suffix))
        assert expected == reference_tokens(tokenizer, prompt), repr(prompt[:80])


def test_templates_are_the_pipelines() -> None:
    words = LongCatImagePipeline.__init__.__code__.co_consts
    assert prompts.TEXT_TO_IMAGE_PREFIX in words
    assert prompts.SUFFIX in words


@pytest.mark.parametrize("prompt", LONG, ids=range(len(LONG)))
def test_long_prompts_are_cut_and_the_report_says_what(tokenizer: Any, prompt: str) -> None:
    tokens = prompts.tokenize(tokenizer, prompt)
    assert len(tokens.ids) == prompts.MAX_TOKENS
    assert tokens.total > prompts.MAX_TOKENS
    # A character of several tokens may be cut in two.
    assert prompt.endswith(tokens.cut.lstrip("\ufffd"))
    report = tokens.report()
    assert "512 / 512" in report
    assert f"{tokens.total - 512} tokens over the limit" in report
    assert tokens.cut in report
