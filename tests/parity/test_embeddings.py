"""Prompt embeddings are those of the official stack, though transformers 5 numbers text positions otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from longcat_pack.longcat_backend import prompts, text_encoder

FIXTURE = Path(__file__).with_name("reference_embeddings.safetensors")
TOLERANCE = 1e-5


def fixture_prompts() -> list[str]:
    with safe_open(FIXTURE, framework="pt") as file:
        return json.loads(file.metadata()["prompts"])


def official(index: int) -> torch.Tensor:
    """Embeddings (512, hidden size) made with transformers 4.57.1, see tools/make_reference_embeddings.py."""
    with safe_open(FIXTURE, framework="pt") as file:
        return file.get_tensor(str(index))


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("index", range(len(fixture_prompts())))
def test_embeddings_equal_the_official_ones(index: int, loaded: Any) -> None:
    _, clip, _ = loaded("core")
    embeddings = clip.encode_from_tokens(clip.tokenize(fixture_prompts()[index]))
    assert embeddings.shape == (1, *official(index).shape)
    assert relative_error(embeddings[0], official(index)) <= TOLERANCE


def test_the_reference_pipeline_of_the_parity_tests_is_official_too(reference: Any) -> None:
    for index, prompt in enumerate(fixture_prompts()):
        with torch.no_grad():
            embeddings = reference._encode_prompt([prompt])[0]
        assert relative_error(embeddings, official(index)) <= TOLERANCE


def test_positions_matter_for_the_padding(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on after the prompt, as later transformers do, the padding gets another embedding."""
    _, clip, _ = loaded("core")
    tokens = clip.tokenizer.inspect(fixture_prompts()[1])
    real = len(tokens.ids)
    monkeypatch.setattr(text_encoder, "_PAD_POSITION", len(clip.cond_stage_model.encoder.prefix) + real)
    embeddings = clip.cond_stage_model.encoder.encode(tokens.ids)[0]
    assert relative_error(embeddings[:real], official(1)[:real]) <= TOLERANCE
    assert relative_error(embeddings[real:], official(1)[real:]) > 100 * TOLERANCE


def test_padding_is_one_embedding_and_fills_all_512_slots(loaded: Any) -> None:
    _, clip, _ = loaded("core")
    embeddings = clip.encode_from_tokens(clip.tokenize("红圆"))[0]
    real = len(prompts.tokenize(clip.tokenizer.tokenizer, "红圆").ids)
    assert embeddings.shape[0] == prompts.MAX_TOKENS
    assert torch.equal(embeddings[real:], embeddings[real : real + 1].expand(512 - real, -1))
    assert not torch.allclose(embeddings[real], embeddings[real - 1])
