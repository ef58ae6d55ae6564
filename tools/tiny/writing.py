"""Let the language model answer requests, and score the answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import LongCatImagePipeline
from transformers import DynamicCache, LogitsProcessorList, Qwen2_5_VLForConditionalGeneration
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from tests.scoring.requests import Request, keeps
from tools.tiny.conversations import END_OF_ANSWER, converse

LONGEST_CAPTION = 32  # tokens; the longest that training shows has 22


def read_instruction(text_encoder: Qwen2_5_VLForConditionalGeneration, instruction: torch.Tensor) -> DynamicCache:
    """Keys and values of the instruction (P,)."""
    model, cache = text_encoder.model.language_model, DynamicCache()
    model(
        inputs_embeds=model.embed_tokens(instruction)[None],
        attention_mask={"full_attention": None},
        position_ids=torch.arange(len(instruction), device=instruction.device).expand(3, 1, -1),
        past_key_values=cache,
        use_cache=True,
    )
    return cache


@torch.no_grad()
def write(
    pipeline: LongCatImagePipeline,
    requests: Sequence[str],
    language: str,
    temperature: float = 0.0,
    seed: int = 0,
    bare: bool = False,
) -> list[str]:
    """The captions that the language model writes for requests of one language, cut where they don't end.

    `bare` leaves the instruction out, but counts its positions.
    """
    text_encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    model, device, texts = text_encoder.model.language_model, text_encoder.device, []
    rows = converse(pipeline, language, requests, [""] * len(requests))
    end, size = tokenizer.convert_tokens_to_ids(END_OF_ANSWER), len(rows.instruction)
    cache = DynamicCache() if bare else read_instruction(text_encoder, rows.instruction.to(device))
    kept = cache.get_seq_length()
    generator = torch.Generator().manual_seed(seed)
    processors = LogitsProcessorList()
    if text_encoder.generation_config.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(text_encoder.generation_config.repetition_penalty))
    if temperature > 0:
        processors.append(TemperatureLogitsWarper(temperature))
    for asked, length in zip(rows.ids, rows.lengths.tolist(), strict=True):
        ids = new = asked[:length]
        while len(ids) < length + LONGEST_CAPTION:
            place = torch.arange(size + len(ids) - len(new), size + len(ids), device=device)
            hidden = model(
                inputs_embeds=model.embed_tokens(new.to(device))[None],
                position_ids=place.expand(3, 1, -1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            known = torch.cat([rows.instruction, ids])[None]
            scores = processors(known, text_encoder.lm_head(hidden[:, -1]).float().cpu())
            if temperature > 0:
                new = torch.multinomial(scores.softmax(-1), 1, generator=generator)[0]
            else:
                new = scores.argmax(-1)
            if new == end:
                break
            ids = torch.cat([ids, new])
        texts.append(tokenizer.decode(ids[length:]))
        cache.crop(kept - cache.get_seq_length())
    return texts


def score_writing(
    pipeline: LongCatImagePipeline, requests: Sequence[Request], temperature: float = 0.0, bare: bool = False
) -> tuple[float, list[tuple[Request, str]]]:
    """Share of requests answered with a full caption that keeps all that was stated, and all answers."""
    answers: list[tuple[Request, str]] = []
    for language in dict.fromkeys(request.language for request in requests):
        own = [request for request in requests if request.language == language]
        texts = write(pipeline, [request.text for request in own], language, temperature, bare=bare)
        answers.extend(zip(own, texts, strict=True))
    return sum(keeps(text, request) for request, text in answers) / len(answers), answers
