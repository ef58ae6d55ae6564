"""Rewriting is the official pipeline's: same question, same tokens; the encoder is afterwards what it was before."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import single_files as single_files_of
import torch
from diffusers import LongCatImagePipeline
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from longcat_pack.longcat_backend import rewriting, single_files
from longcat_pack.longcat_backend.checkpoints import open_checkpoint
from longcat_pack.longcat_backend.comfy_bridge import formats, loading
from longcat_pack.longcat_backend.comfy_bridge import rewriting as bridge
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.rewriting import Sampling

PROMPTS = ("red circle", "红圆", "a star that says 'A' {}", "黄色背景上的 blue square")
TOKENS = 40


@pytest.fixture(scope="module")
def official(folder: Path) -> Any:
    """The pipeline as it is, with the positions of transformers."""
    pipe = LongCatImagePipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipe.tokenizer_max_length = TOKENS  # the limit of its rewriting
    return pipe


@pytest.fixture(scope="module")
def clip(loaded: Any) -> Any:
    return loaded("core")[1]


def question_ids(clip: Any, prompt: str, language: str = rewriting.AUTO) -> list[int]:
    return rewriting.input_ids(formats.source(clip.patcher), clip.tokenizer.tokenizer, prompt, language)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_question_is_the_official_one(prompt: str, clip: Any, official: Any, monkeypatch: Any) -> None:
    seen: list[list[int]] = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(official.text_encoder, "generate", generate)
    official.rewire_prompt(prompt, "cpu")
    assert question_ids(clip, prompt) == seen[0]
    assert question_ids(clip, prompt, rewriting.ENGLISH) != question_ids(clip, prompt, rewriting.CHINESE)


def test_single_files_get_the_published_template_and_settings_and_write_the_same(
    clip: Any, folder: Path, tmp_path: Path
) -> None:
    """They carry neither; the demo's template is the published one, as far as a question needs it."""
    files = single_files_of.write(folder, tmp_path)
    checkpoint = single_files.open_single_files(files, folder / "tokenizer")
    tokenizer = clip.tokenizer.tokenizer
    assert rewriting.input_ids(checkpoint, tokenizer, "红圆", "auto") == question_ids(clip, "红圆")
    rules = rewriting.generation(checkpoint, tokenizer)
    assert rules.repetition_penalty == 1.05
    assert rules.stop == {tokenizer.eos_token_id, tokenizer.pad_token_id}
    head = bridge._head(clip, formats.source(clip.patcher)).model.linear.weight
    assert torch.equal(rewriting.load_head(checkpoint, *head.shape, torch.float32), head)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_the_official_one(prompt: str, clip: Any, official: Any) -> None:
    expected = official.rewire_prompt(prompt, "cpu")[0]
    text, report = bridge.by_encoder(clip, prompt, rewriting.AUTO, Sampling(0, 0.0, TOKENS))
    assert text == expected
    assert "text encoder" in report


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.3])
def test_tokens_are_those_of_transformers_with_and_without_a_penalty(penalty: float, clip: Any, official: Any) -> None:
    ids = question_ids(clip, PROMPTS[1])
    whole = official.text_encoder.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=TOKENS, repetition_penalty=penalty, eos_token_id=1, pad_token_id=0
        ),
    )
    expected = whole[0, len(ids) :].tolist()
    rules = rewriting.Generation(frozenset({1}), penalty)
    written, complete = write(clip, ids, rules, Sampling(0, 0.0, TOKENS))
    assert [*written, *([1] if complete else [])] == expected


def write(
    clip: Any, ids: list[int], rules: Any, sampling: Sampling, progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[list[int], bool]:
    head = bridge._head(clip, formats.source(clip.patcher)).model
    encoder = clip.cond_stage_model.encoder
    return rewriting.generate(encoder, head, ids, rules, sampling, torch.device("cpu"), progress)


NEVER = rewriting.Generation(frozenset(), 1.0)


def test_same_seed_same_text_and_another_seed_another(clip: Any) -> None:
    ids = question_ids(clip, PROMPTS[0])
    first = write(clip, ids, NEVER, Sampling(7, 1.5, TOKENS))
    assert write(clip, ids, NEVER, Sampling(7, 1.5, TOKENS)) == first
    assert write(clip, ids, NEVER, Sampling(8, 1.5, TOKENS)) != first
    assert write(clip, ids, NEVER, Sampling(7, 0.0, TOKENS)) == write(clip, ids, NEVER, Sampling(8, 0.0, TOKENS))
    assert len(first[0]) == TOKENS and not first[1]


def test_a_limit_cuts_the_same_text_and_says_so(clip: Any) -> None:
    ids = question_ids(clip, PROMPTS[0])
    long, _ = write(clip, ids, NEVER, Sampling(3, 1.0, 12))
    assert write(clip, ids, NEVER, Sampling(3, 1.0, 5)) == (long[:5], False)
    stop = rewriting.Generation(frozenset({long[5]}), 1.0)
    assert write(clip, ids, stop, Sampling(3, 1.0, 12)) == (long[: long.index(long[5])], True)


def test_the_encoder_is_afterwards_what_it_was_before(clip: Any) -> None:
    def embeddings() -> torch.Tensor:
        return clip.encode_from_tokens(clip.tokenize("a large red star, “一”"))

    before = embeddings()
    keys = set(clip.cond_stage_model.state_dict())
    bridge.by_encoder(clip, PROMPTS[0], "auto", Sampling(0, 0.0, 8))
    assert torch.equal(embeddings(), before)
    assert set(clip.cond_stage_model.state_dict()) == keys


def test_interruption_ends_the_run_within_two_tokens(clip: Any, monkeypatch: Any) -> None:
    forwards = 0
    model = clip.cond_stage_model.encoder.model

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:
            comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(rewriting, "generation", lambda *_: NEVER)
    handle = model.register_forward_pre_hook(count)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            bridge.by_encoder(clip, PROMPTS[0], "auto", Sampling(0, 0.0, 400))
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert 3 <= forwards <= 5


def test_progress_is_told_after_each_token_and_can_end_the_run(clip: Any) -> None:
    """Layers of ComfyUI notice an interruption by themselves; those of other libraries do not."""
    ids = question_ids(clip, PROMPTS[0])
    told: list[tuple[int, int]] = []
    write(clip, ids, NEVER, Sampling(0, 0.0, 4), lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

    class Stop(Exception):
        """What the host raises."""

    def stop_at_two(done: int, total: int) -> None:
        told.append((done, total))
        if done == 2:
            raise Stop

    told.clear()
    with pytest.raises(Stop):
        write(clip, ids, NEVER, Sampling(0, 0.0, 400), stop_at_two)
    assert told == [(1, 400), (2, 400)]


def test_the_cache_of_keys_makes_every_later_step_one_token_long(clip: Any) -> None:
    lengths: list[int] = []
    model = clip.cond_stage_model.encoder.model
    handle = model.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = question_ids(clip, PROMPTS[0])
    try:
        write(clip, ids, NEVER, Sampling(0, 0.0, 6))
    finally:
        handle.remove()
    assert lengths == [len(ids), 1, 1, 1, 1, 1]


def test_the_head_is_read_once_counts_as_memory_and_goes_with_the_encoder(folder: Path, comfy_dir: Path) -> None:
    clip = loading.load("LongCat-Tiny", "core", "fp32", "fp32")[1]
    assert clip.cond_stage_model.head_patcher is None
    bridge.by_encoder(clip, PROMPTS[0], "auto", Sampling(0, 0.0, 2))
    patcher = clip.cond_stage_model.head_patcher
    config = clip.cond_stage_model.encoder.model.config
    assert patcher.model_size() == config.vocab_size * config.hidden_size * 4
    assert any(entry.model is patcher for entry in comfy.model_management.current_loaded_models)
    bridge.by_encoder(clip.clone(), PROMPTS[1], "auto", Sampling(0, 0.0, 2))
    assert clip.cond_stage_model.head_patcher is patcher
    head = weakref.ref(patcher.model)
    del clip, patcher
    gc.collect()
    assert head() is None


@pytest.fixture
def headless(folder: Path, tmp_path: Path) -> Path:
    """The demo checkpoint without its output head."""
    copy = tmp_path / "LongCat-Tiny-headless"
    shutil.copytree(folder, copy)
    file = copy / "text_encoder" / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != rewriting.HEAD}, file)
    return copy


def test_a_checkpoint_without_head_is_refused_with_the_reason(headless: Path) -> None:
    with pytest.raises(LongCatError, match=r"no output head \(lm_head.weight\).*official folder") as caught:
        rewriting.load_head(open_checkpoint(headless), 8, 8, torch.float32)
    assert "输出头" in caught.value.zh


def test_a_head_of_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(LongCatError, match=r"lm_head.weight .* ≠ \(8, 8\)"):
        rewriting.load_head(open_checkpoint(folder), 8, 8, torch.float32)


def test_the_checkpoints_own_template_and_settings_are_used(headless: Path, clip: Any) -> None:
    tokenizer = clip.tokenizer.tokenizer
    template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}!"
    processor = headless / "text_processor"
    (processor / "chat_template.jinja").unlink()
    (processor / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    settings = {"eos_token_id": [3, 4], "repetition_penalty": 1.25}
    (headless / "text_encoder" / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    checkpoint = open_checkpoint(headless)
    ids = rewriting.input_ids(checkpoint, tokenizer, "red circle", "auto")
    assert ids == tokenizer(rewriting.question("red circle") + "!")["input_ids"]
    assert rewriting.generation(checkpoint, tokenizer) == rewriting.Generation(frozenset({3, 4}), 1.25)
    (processor / "chat_template.json").write_text("{", encoding="utf-8")
    with pytest.raises(LongCatError, match="text_processor"):
        rewriting.input_ids(checkpoint, tokenizer, "red circle", "auto")


def test_a_prompt_that_cannot_be_used_is_refused(clip: Any) -> None:
    with pytest.raises(LongCatError, match="at most 2048"):
        question_ids(clip, "red circle " * 3000)
    with pytest.raises(LongCatError, match="U\\+D83D"):
        question_ids(clip, "a star \ud83d")
    with pytest.raises(LongCatError, match="needs the CLIP of LongCatLoader"):
        bridge.by_encoder(None, "a star", "auto", Sampling(0, 0.0, 2))


def test_numbers_that_are_not_finite_are_refused(clip: Any) -> None:
    encoder = clip.cond_stage_model.encoder

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 8), float("nan"))

    with pytest.raises(LongCatError, match="NaN"):
        rewriting.generate(encoder, head, [1, 2], NEVER, Sampling(0, 0.0, 2), torch.device("cpu"), lambda *_: None)
