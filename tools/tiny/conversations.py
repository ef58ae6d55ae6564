"""Conversations in which LongCat's instruction asks the language model to rewrite a short request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import LongCatImagePipeline

from longcat_backend.prompts import token_ids
from longcat_backend.rewriting import question
from tests.scoring.requests import Request, training_request
from tests.scoring.scenes import Scene, plain_caption

END_OF_ANSWER = "<|im_end|>"
MARK = "\u2603"  # stands for the request where a conversation is taken apart
USUAL = {"background": ("white", "black"), "colour": ("red", "blue")}  # the first that stands out from the other
USUAL_SHARE = 0.6  # of the colours that a request leaves open


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

    def draw(self, count: int) -> Conversations:
        """`count` random rows, no wider than the longest of them."""
        chosen = torch.randint(len(self.ids), (count,))
        lengths = self.lengths[chosen]
        return Conversations(self.instruction, self.ids[chosen, : int(lengths.max())], self.starts[chosen], lengths)

    def answers(self) -> torch.Tensor:
        """Which tokens (N, W) are of answers."""
        index = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (index >= self.starts[:, None]) & (index < self.lengths[:, None])


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
    pipeline: LongCatImagePipeline, language: str, requests: Sequence[str], answers: Sequence[str]
) -> Conversations:
    """Conversations of requests in one language; an answer without an end of its own gets one, but for an empty one.

    Raises ValueError when a conversation's tokens are not those of the instruction and of what follows it.
    """
    tokenizer = pipeline.tokenizer
    text, instruction = _instruction(pipeline, language)
    before, behind = _chat(pipeline, MARK, language).removeprefix(text).split(MARK)
    questions = tokenizer([before + request + behind for request in requests], add_special_tokens=False)["input_ids"]
    for request, asked in list(zip(requests, questions, strict=True))[:8]:
        if list(token_ids(tokenizer, _chat(pipeline, request, language))) != instruction + asked:
            raise ValueError(f"the instruction does not end at a token's end before {request!r}")
    ends = [answer and answer + END_OF_ANSWER for answer in answers]
    written = tokenizer(ends, add_special_tokens=False)["input_ids"]
    rows = [[*asked, *answer] for asked, answer in zip(questions, written, strict=True)]
    width = max(map(len, rows))
    padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    return Conversations(
        torch.tensor(instruction),
        torch.tensor(padded),
        torch.tensor([len(asked) for asked in questions]),
        torch.tensor([len(row) for row in rows]),
    )


def _with_usual_colours(scene: Scene, request: Request, rng: random.Random) -> Scene:
    """`scene` with usual colours, mostly, where the request leaves them open, so that the likeliest pair differs."""
    for name, other in (("background", "colour"), ("colour", "background")):
        if name not in dict(request.stated) and rng.random() < USUAL_SHARE:
            scene = replace(scene, **{name: next(v for v in USUAL[name] if v != getattr(scene, other))})
    return scene


def training_conversations(pipeline: LongCatImagePipeline, language: str, count: int) -> Conversations:
    """`count` conversations about training scenes; what a request leaves out, the answer draws."""
    rng = random.Random(f"training requests, {language}")
    pairs = [training_request(language, rng) for _ in range(count)]
    answers = [plain_caption(_with_usual_colours(scene, request, rng), language) for request, scene in pairs]
    return converse(pipeline, language, [request.text for request, _ in pairs], answers)
