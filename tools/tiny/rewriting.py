"""Teach the language model to write a full caption for a short request, behind LongCat's own instruction.

The embeddings that the DiT is conditioned on are held to those of the model that it was trained with, so that its
pictures stay what they are.

The instruction is thousands of tokens long and the same for every request of a language. Its keys and values are
computed every so many steps, and a step's rows see all of its end and a random part of the rest, each key of which
counts for as many as were left out: the expected sum over the instruction is the whole one's.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LongCatImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.scoring.requests import held_out_requests
from tests.scoring.scenes import LANGUAGES, caption, training_scenes
from tests.scoring.zorb import caption as zorb_caption
from tests.scoring.zorb import scenes as zorb_scenes
from tools.tiny.conditioning import TokenRows, encode, tokenize
from tools.tiny.conversations import Conversations, training_conversations
from tools.tiny.writing import read_instruction, score_writing

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer, each (1, heads, tokens, width)
NEAR = 32  # tokens at the instruction's end
HEEDED = 160  # of those before, the ones that get the most attention in a layer
SAMPLED = 96  # of all others
WATCHED = 16  # rows that tell which get attention
WARMUP = 100  # steps of each stage
FIRST_REACH = 1e-3


class Before:
    """Puts the same keys and values before those of every row, as a layer's attention asks (transformers' Cache)."""

    def __init__(self, layers: KeysAndValues) -> None:
        self.layers = layers

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a batch (B, heads, W, width), with what comes before it."""
        both = zip(self.layers[layer], (keys, values), strict=True)
        first, second = (torch.cat([old.expand(len(new), -1, -1, -1), new], dim=2) for old, new in both)
        return first, second


@dataclass(frozen=True)
class Stage:
    """A stretch of training."""

    seconds: float
    share: float  # of the rows, that see the whole instruction; the others see some of its last tokens
    reach: float  # weight at its end of all but the instruction's last tokens; it grows from the last stage's
    hold: float  # weight of the embeddings' error
    learning_rate: float
    decay: bool

    @classmethod
    def parse(cls, text: str) -> Stage:
        """Read `seconds:share:reach:hold:rate`, with `:decay` behind it for a rate that falls as a cosine does."""
        *numbers, rate = text.removesuffix(":decay").split(":")
        seconds, share, reach, hold = map(float, numbers)
        return cls(seconds, share, reach, hold, float(rate), text.endswith(":decay"))


@dataclass(frozen=True)
class RewritingSettings:
    """Everything that decides the result, but for the seed and the time that the stages get."""

    stages: tuple[Stage, ...] = (
        Stage(900, 0.0, FIRST_REACH, 20, 2e-3, False),
        Stage(400, 0.6, 1.0, 20, 2e-3, False),
        Stage(1200, 0.95, 1.0, 50, 2e-3, True),
    )
    batch: int = 24  # conversations a step, Chinese and English ones by turns
    captions: int = 3  # a step, whose embeddings are held
    refresh: int = 100  # steps that the keys and values of the instruction last
    conversations: int = 40_000  # of each language, to draw from
    score_every: int = 4  # of the held-out requests, one in so many scores a stage


def deepen(text_encoder: Qwen2_5_VLForConditionalGeneration, layers: int) -> None:
    """Add layers at the end of the language model that begin as the identity."""
    config, model = text_encoder.config.text_config, text_encoder.model.language_model
    for _ in range(layers):
        config.layer_types = [*config.layer_types, config.layer_types[-1]]
        layer = type(model.layers[0])(config, config.num_hidden_layers)
        config.num_hidden_layers += 1
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        model.layers.append(layer.to(model.embed_tokens.weight))


def captions_to_hold(pipeline: LongCatImagePipeline, count: int) -> TokenRows:
    """Rows of captions without a character, which the DiT knows, a tenth of zorbs, now and then the empty prompt.

    Characters are left out: the DiT has never seen them, and requests need the embeddings of their tokens.
    """
    rng, scenes, zorbs = random.Random("captions to hold"), training_scenes(), zorb_scenes(True)
    texts = []
    for index in range(count):
        scene, zorb, language, kind = rng.choice(scenes), rng.choice(zorbs), LANGUAGES[index % 2], rng.random()
        text = zorb_caption(zorb, language, rng) if kind < 0.1 else caption(scene, language, rng)
        texts.append("" if kind > 0.98 else text)
    return tokenize(pipeline, texts)


class RewritingTrainer:
    """One run over the stages; the pipeline's language model is trained in place."""

    def __init__(
        self,
        pipeline: LongCatImagePipeline,
        reference: Qwen2_5_VLForConditionalGeneration,
        settings: RewritingSettings,
    ) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.text_encoder, self.device = pipeline.text_encoder, pipeline.text_encoder.device
        self.reference = reference.requires_grad_(False)
        self.rows = captions_to_hold(pipeline, settings.conversations)
        self.conversations = [training_conversations(pipeline, lang, settings.conversations) for lang in LANGUAGES]
        self.read: list[tuple[KeysAndValues, list[torch.Tensor]]] = []
        model = self.text_encoder.model.language_model
        self.parameters = [*model.parameters(), self.text_encoder.lm_head.weight]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
        self.step, self.reach = 0, FIRST_REACH

    @torch.no_grad()
    def _read(self, conversations: Conversations) -> tuple[KeysAndValues, list[torch.Tensor]]:
        """Keys and values of an instruction, and each layer's order of its tokens by how little attention they get."""
        model, drawn = self.text_encoder.model.language_model, conversations.draw(WATCHED).to(self.device)
        cache = read_instruction(self.text_encoder, drawn.instruction)
        known = [(layer.keys, layer.values) for layer in cache.layers]
        size, width = len(conversations.instruction), drawn.ids.shape[1]
        mask = torch.cat([torch.zeros(width, size), torch.full((width, width), -math.inf).triu(1)], dim=1)[None, None]
        attention, model.config._attn_implementation = model.config._attn_implementation, "eager"
        seen = model(
            inputs_embeds=model.embed_tokens(drawn.ids),
            attention_mask={"full_attention": mask.to(self.device)},
            position_ids=torch.arange(size, size + width, device=self.device).expand(3, WATCHED, -1),
            past_key_values=Before(known),
            use_cache=True,
            output_attentions=True,
        ).attentions
        model.config._attn_implementation = attention
        return known, [layer[..., : size - NEAR].amax((0, 1, 2)).argsort() for layer in seen]

    def _instruction(self, language: int) -> KeysAndValues:
        """Keys and values of the instruction, some steps old, as a step's rows see them."""
        if self.step % self.settings.refresh == 0 or not self.read:
            self.read = [self._read(c) for c in self.conversations]
        size = len(self.conversations[language].instruction)
        chosen, near = torch.randint(size - NEAR - HEEDED, (SAMPLED,)), torch.arange(size - NEAR, size)
        parts: KeysAndValues = []
        for (keys, values), order in zip(*self.read[language], strict=True):
            seen = torch.cat([order[chosen], order[-HEEDED:], near.to(order)])
            parts.append((keys[:, :, seen], values[:, :, seen]))
        return parts

    def _mask(self, batch: int, width: int, rest: int, share: float) -> torch.Tensor:
        """What each row adds to its attention's logits (B, 1, W, SAMPLED + HEEDED + NEAR + W).

        A row that sees the whole instruction counts each sampled token for as many as it stands for, times the reach
        or up to a hundred times less.
        """
        index = torch.arange(width)
        causal = torch.where(index[None, :] <= index[:, None], 0.0, -math.inf).expand(batch, 1, -1, -1)
        whole = torch.rand(batch, 1) < share
        weight = math.log(self.reach) - (math.log(100) * torch.rand(batch, 1) if self.reach < 1 else 0)
        counts = torch.cat([torch.full((SAMPLED,), (rest - HEEDED) / SAMPLED), torch.ones(HEEDED)]).log()
        far = torch.where(whole, weight + counts, -math.inf)
        first = torch.where(whole, 0, torch.randint(NEAR + 1, (batch, 1)))
        near = torch.where(torch.arange(NEAR) >= first, 0.0, -math.inf)
        before = torch.cat([far, near], dim=1)[:, None, None].expand(-1, -1, width, -1)
        return torch.cat([before, causal], dim=-1).to(self.device)

    def _writing_loss(self, share: float) -> torch.Tensor:
        """Cross entropy of the answers in a batch of conversations, `share` of which see the whole instruction."""
        language = self.step % len(LANGUAGES)
        drawn = self.conversations[language].draw(self.settings.batch).to(self.device)
        size, (batch, width) = len(drawn.instruction), drawn.ids.shape
        model = self.text_encoder.model.language_model
        hidden = model(
            inputs_embeds=model.embed_tokens(drawn.ids),
            attention_mask={"full_attention": self._mask(batch, width, size - NEAR, share)},
            position_ids=torch.arange(size, size + width, device=self.device).expand(3, batch, -1),
            past_key_values=Before(self._instruction(language)),
            use_cache=True,
        ).last_hidden_state
        wanted = drawn.answers()[:, 1:]
        return F.cross_entropy(self.text_encoder.lm_head(hidden[:, :-1][wanted]), drawn.ids[:, 1:][wanted])

    def held_error(self) -> torch.Tensor:
        """Squared error of captions' embeddings, relative to their square."""
        rows = self.rows.take(torch.randint(len(self.rows.ids), (self.settings.captions,)))
        width = int(rows.lengths.max()) + 1
        rows = TokenRows(rows.ids[:, :width].contiguous(), rows.lengths, rows.prefix).to(self.device)
        real = torch.arange(rows.prefix, width, device=self.device) <= rows.lengths[:, None]
        with torch.no_grad():
            wanted = encode(self.reference, rows, width - rows.prefix)[real]
        found = encode(self.text_encoder, rows, width - rows.prefix)[real]
        return (found - wanted).square().sum() / wanted.square().sum()

    def train(self, log: Callable[[str], None], log_every: int, done: Callable[[], None]) -> None:
        """Run all stages, with `done` after each."""
        for stage in self.settings.stages:
            log(str(stage))
            self._run(stage, log, log_every)
            done()
            log(f"step {self.step} " + " ".join(f"{name} {value:.2f}" for name, value in self.scores(stage).items()))

    def _run(self, stage: Stage, log: Callable[[str], None], log_every: int) -> None:
        began = mark = time.monotonic()
        first = last = self.step
        reach = self.reach
        sums = torch.zeros(2)
        while (spent := (time.monotonic() - began) / stage.seconds) < 1:
            self.reach = reach * (stage.reach / reach) ** spent
            rate = min(1.0, (self.step - first + 1) / WARMUP)
            if stage.decay:
                rate *= 0.5 + 0.5 * math.cos(math.pi * spent)
            self.optimizer.param_groups[0]["lr"] = stage.learning_rate * rate
            writing, held = self._writing_loss(stage.share), self.held_error()
            self.optimizer.zero_grad(set_to_none=True)
            (writing + stage.hold * held).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            sums += torch.stack([writing, held]).detach().cpu()
            if self.step % log_every == 0:
                pace = (time.monotonic() - mark) / (self.step - last) * 1000
                writing, held = (sums / (self.step - last)).tolist()
                log(f"step {self.step} writing {writing:.4f} held {held:.2e} {pace:.0f} ms/step")
                mark, last, sums = time.monotonic(), self.step, torch.zeros(2)
        self.reach = stage.reach

    def scores(self, stage: Stage) -> dict[str, float]:
        """Share of some held-out requests whose rewrite keeps all that was stated, as the stage's rows see them."""
        some = held_out_requests()[:: self.settings.score_every]
        shares = {"bare": score_writing(self.pipeline, some, bare=True)[0]}
        if stage.share > 0:
            shares["behind"] = score_writing(self.pipeline, some)[0]
        return shares
