"""Teach the language model to write a full caption for a short request, behind LongCat's own instruction.

The instruction is thousands of tokens long and the same for every request of a language, so its keys and values are
computed once for a batch, with their gradient.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LongCatImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration

from longcat_backend.prompts import token_ids
from longcat_backend.rewriting import question
from tests.scoring.requests import Request, keeps, training_request
from tests.scoring.scenes import caption

END_OF_ANSWER = "<|im_end|>"
LONGEST_CAPTION = 32  # tokens; the longest that training shows has 22
IGNORED = -100
MARK = "\u2603"  # stands for the request where a conversation is taken apart
BARE_SHARE = 0.25  # rows that don't see the instruction: they teach copying before 6,000 tokens can be ignored


@dataclass
class Conversations:
    """Right-padded rows of one language: what follows the instruction, and in training the answer behind it."""

    instruction: torch.Tensor  # (P,) int64, the tokens before the user's words
    ids: torch.Tensor  # (N, W) int64
    starts: torch.Tensor  # (N,) int64, where the answer begins
    lengths: torch.Tensor  # (N,) int64, of the row without its pads

    def to(self, device: torch.device) -> Conversations:
        """The same rows on `device`."""
        parts = (self.instruction, self.ids, self.starts, self.lengths)
        return Conversations(*(part.to(device) for part in parts))


class InstructionCache:
    """Keys and values of the instruction, as a layer's attention asks for them (transformers' `Cache.update`).

    Filled by a forward over the instruction alone; then every row of a batch sees them, with their gradient.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the instruction's (1, heads, P, width), or put it before those of a batch (B, heads, W, width)."""
        keys = keys.to(values.dtype)
        if layer not in self.layers:
            self.layers[layer] = (keys, values)
            return keys, values
        both = zip(self.layers[layer], (keys, values), strict=True)
        known, new = (torch.cat([old.expand(len(part), -1, -1, -1), part], dim=2) for old, part in both)
        return known, new


def _chat(pipeline: LongCatImagePipeline, request: str, language: str) -> str:
    message = [{"role": "user", "content": [{"type": "text", "text": question(request, language)}]}]
    template = pipeline.text_processor.chat_template
    return str(
        pipeline.tokenizer.apply_chat_template(
            message, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def _instruction(pipeline: LongCatImagePipeline, language: str) -> tuple[str, list[int]]:
    """The text and tokens that all conversations of a language begin with."""
    first, second = (list(token_ids(pipeline.tokenizer, _chat(pipeline, text, language))) for text in ("A", "十"))
    same = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return pipeline.tokenizer.decode(first[:same]), first[:same]


def converse(
    pipeline: LongCatImagePipeline, language: str, requests: Sequence[str], answers: Sequence[str] | None = None
) -> Conversations:
    """Conversations of requests in one language; without answers there is room for LONGEST_CAPTION tokens.

    Raises ValueError when a conversation's tokens are not those of the instruction and of what follows it.
    """
    tokenizer = pipeline.tokenizer
    text, instruction = _instruction(pipeline, language)
    before, behind = _chat(pipeline, MARK, language).removeprefix(text).split(MARK)
    questions = tokenizer([before + request + behind for request in requests], add_special_tokens=False)["input_ids"]
    for request, asked in list(zip(requests, questions, strict=True))[:8]:
        if list(token_ids(tokenizer, _chat(pipeline, request, language))) != instruction + asked:
            raise ValueError(f"the instruction does not end at a token's end before {request!r}")
    ends = [answer + END_OF_ANSWER for answer in answers or ()]
    written = tokenizer(ends, add_special_tokens=False)["input_ids"] if ends else [[] for _ in questions]
    rows = [[*asked, *answer] for asked, answer in zip(questions, written, strict=True)]
    width = max(map(len, rows)) + (0 if ends else LONGEST_CAPTION)
    width = -(-width // 8) * 8
    padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    return Conversations(
        torch.tensor(instruction),
        torch.tensor(padded),
        torch.tensor([len(asked) for asked in questions]),
        torch.tensor([len(row) for row in rows]),
    )


def training_conversations(pipeline: LongCatImagePipeline, language: str, count: int) -> Conversations:
    """`count` conversations about training scenes."""
    rng = random.Random(f"training requests, {language}")
    pairs = [training_request(language, rng) for _ in range(count)]
    answers = [caption(scene, language, rng) for _, scene in pairs]
    return converse(pipeline, language, [request.text for request, _ in pairs], answers)


def read_instruction(text_encoder: Qwen2_5_VLForConditionalGeneration, instruction: torch.Tensor) -> InstructionCache:
    """Keys and values of the instruction (P,)."""
    model, cache = text_encoder.model.language_model, InstructionCache()
    model(
        inputs_embeds=model.embed_tokens(instruction)[None],
        attention_mask={"full_attention": None},
        position_ids=torch.arange(len(instruction), device=instruction.device).expand(3, 1, -1),
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def logits(
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    cache: InstructionCache,
    ids: torch.Tensor,
    instruction: int,
    seen: torch.Tensor,
) -> torch.Tensor:
    """What follows each token, (B, W, vocabulary), of rows (B, W) behind an instruction of so many tokens.

    `seen` (B,) says which rows see the instruction; positions count it either way.
    """
    model, (batch, width) = text_encoder.model.language_model, ids.shape
    index = torch.arange(width, device=ids.device)
    causal = (index[None, :] <= index[:, None]).expand(batch, 1, -1, -1)
    before = seen[:, None, None, None].expand(-1, -1, width, instruction)
    hidden = model(
        inputs_embeds=model.embed_tokens(ids),
        attention_mask={"full_attention": torch.cat([before, causal], dim=-1)},
        position_ids=(index + instruction).expand(3, batch, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return text_encoder.lm_head(hidden)


def answer_loss(
    text_encoder: Qwen2_5_VLForConditionalGeneration, conversations: Conversations, batch: int
) -> torch.Tensor:
    """Cross entropy of the answers' tokens in `batch` random conversations, drawn on the device."""
    device, size = conversations.ids.device, len(conversations.instruction)
    chosen = torch.randint(len(conversations.ids), (batch,), device=device)
    ids = conversations.ids[chosen]
    cache = read_instruction(text_encoder, conversations.instruction)
    seen = torch.rand(batch, device=device) >= BARE_SHARE
    said = logits(text_encoder, cache, ids, size, seen).float()
    index = torch.arange(ids.shape[1], device=device)
    inside = (index >= conversations.starts[chosen, None]) & (index < conversations.lengths[chosen, None])
    wanted = torch.where(inside, ids, IGNORED)
    return F.cross_entropy(said[:, :-1].flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def write(
    pipeline: LongCatImagePipeline, requests: Sequence[str], language: str, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """The captions that the language model writes for requests of one language, cut where they don't end."""
    device = pipeline.text_encoder.device
    rows = converse(pipeline, language, requests).to(device)
    cache = read_instruction(pipeline.text_encoder, rows.instruction)
    end = pipeline.tokenizer.convert_tokens_to_ids(END_OF_ANSWER)
    seen = torch.ones(len(rows.ids), dtype=torch.bool, device=device)
    line, at, finished = torch.arange(len(rows.ids), device=device), rows.lengths.clone(), ~seen
    generator = torch.Generator().manual_seed(seed)
    for _ in range(LONGEST_CAPTION):
        said = logits(pipeline.text_encoder, cache, rows.ids, len(rows.instruction), seen)[line, at - 1].float().cpu()
        if temperature > 0:
            token = torch.multinomial((said / temperature).softmax(-1), 1, generator=generator)[:, 0].to(device)
        else:
            token = said.argmax(-1).to(device)
        finished |= token == end
        rows.ids[line, at] = torch.where(finished, end, token)
        at += 1
        if finished.all():
            break
    texts = [row[start:stop].tolist() for row, start, stop in zip(rows.ids, rows.starts, at, strict=True)]
    return [pipeline.tokenizer.decode([i for i in text if i != end]) for text in texts]


def score_writing(
    pipeline: LongCatImagePipeline, requests: Sequence[Request], temperature: float = 0.0
) -> tuple[float, list[tuple[Request, str]]]:
    """Share of requests answered with a full caption that keeps all that was stated, and all answers."""
    answers: list[tuple[Request, str]] = []
    for language in dict.fromkeys(request.language for request in requests):
        own = [request for request in requests if request.language == language]
        texts = write(pipeline, [request.text for request in own], language, temperature)
        answers.extend(zip(own, texts, strict=True))
    return sum(keeps(text, request) for request, text in answers) / len(answers), answers
