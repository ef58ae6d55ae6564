"""Train the DiT, with or without its text encoder, on cached latents and token rows, one captured graph a step."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import LongCatImagePipeline

from tests.scoring.scenes import Scene, held_out_character_prompts, held_out_prompts
from tools.tiny.conditioning import TEXT_SLOTS, TokenRows, encode, position_ids
from tools.tiny.examples import Examples
from tools.tiny.sampling import TOKEN_SIDE, sample, score, score_characters, shift_mu
from tools.tiny.vae import cosine

EMPTY_PROMPT_SHARE = 0.1
CHARACTER_SHARE = 0.45  # of the rows show a character; in a rehearsal REHEARSED_SHARE
REHEARSED_SHARE = 0.75
REHEARSED_NOISE = 1.0  # added to the logit of sigma: which character it is has to be read where none is seen yet
CHARACTER_WEIGHT = 4.0  # added to the loss of tokens in which the characters of a scene differ
GRAPH_WARMUP = 3


@dataclass(frozen=True)
class Phase:
    """A stretch of training. Fewer than 512 text slots is a cheaper rehearsal: most of them hold pads anyway.

    It ends after its steps or its time, whichever is over first; a decaying learning rate is zero then.
    """

    steps: int
    slots: int
    batch: int
    decay: bool  # cosine to zero over the phase, or a constant learning rate
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Phase:
        """Read `steps:slots:batch`, with `:decay` behind it for a decaying learning rate, and `:SECONDSs` for time."""
        found = re.fullmatch(r"(\d+):(\d+):(\d+)(:decay)?(?::([\d.]+)s)?", text)
        if found is None:
            raise ValueError(f"expected steps:slots:batch[:decay][:SECONDSs], got {text!r}")
        steps, slots, batch, decay, seconds = found.groups()
        return cls(int(steps), int(slots), int(batch), decay is not None, float(seconds or math.inf))


@dataclass(frozen=True)
class FlowSettings:
    """Everything that decides the result, but for the seed."""

    phases: tuple[Phase, ...] = (Phase(14_000, 64, 256, False), Phase(30_000, TEXT_SLOTS, 128, True))
    learning_rate: float = 1.5e-3
    warmup: int = 300
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    score_prompts: int = 100  # held-out prompts of each language that progress is scored on
    compile: bool = True
    freeze_text: bool = False  # only the DiT learns


def _autocast_blocks(pipeline: LongCatImagePipeline) -> None:
    """Run the DiT's and the text encoder's blocks in bf16.

    The timestep, the embedders and the residual streams stay fp32, as in an fp32 pipeline.
    """
    transformer, text = pipeline.transformer, pipeline.text_encoder.model.language_model
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks, *text.layers):

        def forward(*args: Any, inner: Callable[..., Any] = block.forward, **kwargs: Any) -> Any:
            with torch.autocast(transformer.device.type, torch.bfloat16, cache_enabled=False):
                return inner(*args, **kwargs)

        block.forward = forward


class FlowTrainer:
    """One training run; `named` are the trained weights, `average` their moving average."""

    def __init__(self, pipeline: LongCatImagePipeline, examples: Examples, settings: FlowSettings, seed: int) -> None:
        self.pipeline, self.examples, self.settings, self.seed = pipeline, examples, settings, seed
        self.device = pipeline.transformer.device
        self.twin = copy.deepcopy(pipeline)  # draws with the averaged weights
        self.named = self._named(pipeline)
        self.parameters = list(self.named.values())
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.slots = 0, settings.phases[0].slots
        self.rate = torch.zeros((), device=self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
        )
        _autocast_blocks(pipeline)
        _autocast_blocks(self.twin)
        self.captured: tuple[torch.cuda.CUDAGraph, Callable[[], None]] | None = None
        self.mu = shift_mu(pipeline, TOKEN_SIDE**2)

    @staticmethod
    def _trained(pipeline: LongCatImagePipeline) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, p in pipeline.transformer.named_parameters():
            yield f"transformer.{name}", p
        for name, p in pipeline.text_encoder.model.language_model.named_parameters():
            yield f"text_encoder.model.language_model.{name}", p

    def _named(self, pipeline: LongCatImagePipeline) -> dict[str, torch.nn.Parameter]:
        named = dict(self._trained(pipeline))
        if self.settings.freeze_text:
            pipeline.text_encoder.requires_grad_(False)
            return {name: p for name, p in named.items() if p.requires_grad}
        return named

    def second_moments(self) -> list[torch.Tensor]:
        """Adam's running squared gradients, in the order of `named`; empty before the first step."""
        return [self.optimizer.state[p]["exp_avg_sq"] for p in self.parameters if p in self.optimizer.state]

    def _learning_rate(self, phase: Phase, step: int, spent: float) -> float:
        if phase.decay:
            return self.settings.learning_rate * cosine(step, phase.steps, self.settings.warmup, spent)
        return self.settings.learning_rate * min(1.0, (step + 1) / self.settings.warmup)

    def _loss_function(self, slots: int) -> Callable[..., torch.Tensor]:
        txt_ids, img_ids = position_ids(slots, TOKEN_SIDE, self.device)

        def loss(
            noisy: torch.Tensor, sigma: torch.Tensor, rows: TokenRows, velocity: torch.Tensor, weight: torch.Tensor
        ) -> torch.Tensor:
            text = encode(self.pipeline.text_encoder, rows, slots)
            drawn = self.pipeline.transformer(noisy, text, sigma, img_ids, txt_ids, return_dict=False)[0]
            return ((drawn.float() - velocity).square().mean(-1) * weight).mean()

        return torch.compile(loss, dynamic=False) if self.settings.compile else loss

    def _batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, TokenRows, torch.Tensor, torch.Tensor]:
        """Noisy tokens (B, 64, 64), sigma (B,), token rows, the velocity noise - x0 and its tokens' weights (B, 64)."""
        examples, device = self.examples, self.device
        rehearsed = self.slots < TEXT_SLOTS
        plain, rows = examples.plain, len(examples.first)
        row = torch.randint(plain, (size,), device=device)
        if rows > plain:
            written = torch.rand(size, device=device) < (REHEARSED_SHARE if rehearsed else CHARACTER_SHARE)
            row = torch.where(written, torch.randint(plain, rows, (size,), device=device), row)
        count = examples.count[row]
        picture = torch.minimum((torch.rand(size, device=device) * count).long(), count - 1)
        shown = examples.first[row] + picture
        clean, weight = examples.latents[shown].float(), 1 + CHARACTER_WEIGHT * examples.spread[shown].float()
        dropped = torch.rand(size, device=device) < EMPTY_PROMPT_SHARE
        row = torch.where(dropped, len(examples.rows.ids) - 1, row)
        sigma = torch.sigmoid(torch.randn(size, device=device) + self.mu + rehearsed * REHEARSED_NOISE)
        noise = torch.randn_like(clean)
        mix = sigma[:, None, None]
        return (1 - mix) * clean + mix * noise, sigma, examples.rows.take(row), noise - clean, weight

    def _stepper(self, phase: Phase) -> Callable[[], None]:
        """One optimisation step as a callable; on a GPU it replays a CUDA graph."""
        loss_function = self._loss_function(phase.slots)

        def step() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_function(*self._batch(phase.batch))
            self.loss_sum += loss.detach()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.settings.ema_decay)

        return self._captured(step) if self.device.type == "cuda" else step

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture `step`; the warm-up that capture needs leaves weights, average and moments as they were."""
        kept = [t.detach().clone() for t in (*self.parameters, *self.average, *self.second_moments())]
        self.rate.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            step()
        live = (*self.parameters, *self.average, *self.second_moments())
        with torch.no_grad():
            for target, value in zip(live, kept, strict=False):
                target.copy_(value)
        self.loss_sum.zero_()
        # the graph reads tensors that only the step's closure keeps alive
        self.captured = (graph, step)
        return graph.replay

    def load_moments(self, moments: list[torch.Tensor], step: int) -> None:
        """Resume Adam at `step` with these squared gradients; its mean gradient starts anew."""
        for p, moment in zip(self.parameters, moments, strict=True):
            self.optimizer.state[p] = {
                "step": torch.tensor(float(step), device=self.device if self.device.type == "cuda" else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": moment.to(p),
            }

    def use_average(self) -> LongCatImagePipeline:
        """The pipeline with the averaged weights, the DiT's rounded to bf16 as they will be stored."""
        with torch.no_grad():
            for (name, target), value in zip(self._named(self.twin).items(), self.average, strict=True):
                target.copy_(value.bfloat16() if name.startswith("transformer.") else value)
        return self.twin

    def draw(self, per_language: int) -> tuple[np.ndarray, list[Scene]]:
        """Pictures (N, 128, 128, 3) uint8 of held-out prompts with the averaged weights, and their scenes."""
        pairs = held_out_prompts(per_language, per_language)
        return sample(self.use_average(), [prompt for prompt, _ in pairs], slots=self.slots), [s for _, s in pairs]

    def scores(self) -> dict[str, float]:
        """Shares of held-out prompts that the averaged weights get right."""
        count = self.settings.score_prompts
        shares = score(*self.draw(count))
        pairs = held_out_character_prompts(count, count)
        if len(self.examples.first) > self.examples.plain:
            pictures = sample(self.twin, [prompt for prompt, _ in pairs], slots=self.slots)
            shares["character"] = score_characters(pictures, [scene for _, scene in pairs])
        return shares

    def train(self, stop_at: float, log: Callable[[str], None], log_every: int, score_every: int) -> bool:
        """Train until all phases are done (True) or time.monotonic() reaches `stop_at` (False)."""
        torch.manual_seed(self.seed + self.step)
        first = 0
        for phase in self.settings.phases:
            if self.step < first + phase.steps and not self._run(phase, first, stop_at, log, log_every, score_every):
                return False
            first += phase.steps
        return True

    def _run(
        self, phase: Phase, first: int, stop_at: float, log: Callable[[str], None], log_every: int, score_every: int
    ) -> bool:
        began, self.slots, self.captured = time.monotonic(), phase.slots, None
        step_once = self._stepper(phase)
        self._synchronize()
        log(f"phase of {phase.slots} text slots ready after {time.monotonic() - began:.0f} s")
        began = mark = time.monotonic()
        end, mark_step = min(stop_at, began + phase.seconds), self.step
        while self.step < first + phase.steps:
            spent = (time.monotonic() - began) / max(end - began, 1e-3)
            self.rate.fill_(self._learning_rate(phase, self.step - first, spent))
            step_once()
            self.step += 1
            if self.step % 50 == 0:
                self._synchronize()
                if time.monotonic() > end:
                    log(f"out of time at step {self.step}")
                    if end == stop_at:
                        return False
                    self.step = first + phase.steps
                    break
            if self.step % log_every == 0 or self.step % score_every == 0:
                self._report(log, self.step - mark_step, mark, self.step % score_every == 0)
                mark, mark_step = time.monotonic(), self.step
        return True

    def _report(self, log: Callable[[str], None], steps: int, since: float, scored: bool) -> None:
        loss = self.loss_sum.item() / steps
        pace = (time.monotonic() - since) / steps * 1000
        self.loss_sum.zero_()
        words = f"step {self.step} loss {loss:.4f} lr {self.rate.item():.2e} {pace:.1f} ms/step"
        if scored:
            words += " | " + " ".join(f"{name} {value:.3f}" for name, value in self.scores().items())
        log(words)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
