"""Train the DiT, the language model and the vision tower together to follow edit instructions."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import LongCatImageEditPipeline

from tests.scoring.edits import Edit
from tests.scoring.scenes import LANGUAGES, PALETTE, Jitter, Scene, compose, shape_mask
from tools.tiny.conditioning import TEXT_SLOTS, TokenRows
from tools.tiny.edit_conditioning import (
    PictureEncoder,
    edit_position_ids,
    encode_instructions,
    picture_patches,
    tokenize_instructions,
)
from tools.tiny.edit_sampling import reference_tokens
from tools.tiny.edit_words import KINDS, LookEdit, every_edit, wordings
from tools.tiny.flow import REHEARSED_NOISE, FlowSettings, FlowTrainer
from tools.tiny.pictures import PLACEMENTS
from tools.tiny.sampling import TOKEN_SIDE
from tools.tiny.vae import cosine

INSTRUCTION_WIDTH = 20  # tokens of instruction and pads in a training row; the longest instruction has 17
TURBO_STEPS = 8
TURBO_SPREAD = 0.25  # of a step, towards the next
SYNCHRONIZE_EVERY = 50


@dataclass(frozen=True)
class EditPhase:
    """A stretch of training in seconds, compilation included; few text slots are a rehearsal, as in `flow.Phase`."""

    seconds: float
    slots: int
    batch: int
    decay: bool  # cosine to zero over the phase's time, or a constant learning rate

    @classmethod
    def parse(cls, text: str) -> EditPhase:
        """Read `seconds:slots:batch`, with `:decay` behind it for a decaying learning rate."""
        found = re.fullmatch(r"([\d.]+):(\d+):(\d+)(:decay)?", text)
        if found is None:
            raise ValueError(f"expected seconds:slots:batch[:decay], got {text!r}")
        seconds, slots, batch, decay = found.groups()
        return cls(float(seconds), int(slots), int(batch), decay is not None)


@dataclass(frozen=True)
class EditRecipe:
    """What is trained: editing with guidance at every noise level, or turbo, at the levels of its 8 steps alone."""

    phases: tuple[EditPhase, ...]
    learning_rate: float
    turbo: bool
    empty_share: float  # of instructions replaced by the empty one, the negative prompt of the official pipeline


EDIT = EditRecipe((EditPhase(250, 64, 192, False), EditPhase(235, TEXT_SLOTS, 96, True)), 8e-4, False, 0.1)
TURBO = EditRecipe((EditPhase(210, TEXT_SLOTS, 96, True),), 4e-4, True, 0.0)


@dataclass
class EditExamples:
    """What the device holds: every training scene in every jitter, every training edit, and rows of instructions.

    Edits are sorted by kind. Instruction j of an edit is row `first_row + j % row_count`; the last row is empty.
    """

    latents: torch.Tensor  # (scenes, jitters, 64 tokens, 64 channels) fp32, scaled
    patches: torch.Tensor  # (scenes, jitters, 16, 588) uint8: what the vision encoder sees
    before: torch.Tensor  # (edits,) index of a scene
    after: torch.Tensor  # (edits,) index of a scene
    first_row: torch.Tensor  # (edits, 2) of each language
    row_count: torch.Tensor  # (edits, 2)
    offsets: torch.Tensor  # (6,) index of the first edit of each kind
    counts: torch.Tensor  # (6,) edits of each kind
    rows: TokenRows


def _pictures_of(placement: tuple[str, str, str], jitter: Jitter) -> tuple[list[Scene], list[np.ndarray]]:
    """A placement in every pair of colours: scenes, and pictures uint8 (128, 128, 3)."""
    mask, pairs = shape_mask(*placement, jitter), list(permutations(PALETTE, 2))
    scenes = [Scene(background, colour, *placement) for background, colour in pairs]
    return scenes, [compose(mask, PALETTE[scene.background], PALETTE[scene.colour]) for scene in scenes]


def _scene_tensors(
    pipeline: LongCatImageEditPipeline, scenes: Sequence[Scene], jitters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and patches of `EditExamples`; every scene has the same jitters, so that an edit keeps its own."""
    device, where = pipeline.vae.device, {scene: index for index, scene in enumerate(scenes)}
    latents = torch.empty(len(scenes), jitters, TOKEN_SIDE**2, 64, device=device)
    patches = torch.empty(len(scenes), jitters, 16, 588, dtype=torch.uint8)
    drawn = [Jitter.sample(random.Random(f"edit/{variant}")) for variant in range(jitters)]

    def prepare(task: tuple[tuple[str, str, str], int]) -> tuple[list[int], int, torch.Tensor, torch.Tensor]:
        placement, variant = task
        pairs = zip(*_pictures_of(placement, drawn[variant]), strict=True)
        kept = [(where[scene], picture) for scene, picture in pairs if scene in where]
        pictures = [picture for _, picture in kept]
        seen = picture_patches(pipeline.image_processor_vl, pictures) if kept else patches[:0, 0]
        return [index for index, _ in kept], variant, torch.from_numpy(np.array(pictures)), seen

    with ThreadPoolExecutor() as pool:
        tasks = [(placement, variant) for placement in PLACEMENTS for variant in range(jitters)]
        for index, variant, pictures, seen in pool.map(prepare, tasks):
            if index:
                patches[index, variant] = seen
                latents[index, variant] = reference_tokens(pipeline, pictures)
    return latents, patches.to(device)


def _instruction_rows(edits: Sequence[Edit | LookEdit]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Every wording once for each shape, attribute and value; and for each edit its first row and their number."""
    texts: list[str] = []
    blocks: dict[tuple[Any, ...], tuple[int, int]] = {}
    table = []
    for edit in edits:
        for language in LANGUAGES:
            key = (language, edit.before.shape, edit.attribute, edit.value)
            if key not in blocks:
                found = wordings(edit, language)
                blocks[key] = (len(texts), len(found))
                texts.extend(found)
            table.append(blocks[key])
    ranges = torch.tensor(table).reshape(len(edits), len(LANGUAGES), 2)
    return texts, ranges[..., 0].contiguous(), ranges[..., 1].contiguous()


def prepare_edit_examples(
    pipeline: LongCatImageEditPipeline, jitters: int, edit_limit: int | None = None
) -> EditExamples:
    """Encode the training scenes with the pipeline's VAE and processor; `edit_limit`: fewer edits, to try it out."""
    edits = every_edit()
    if edit_limit:
        edits = [edit for kind in KINDS for edit in [e for e in edits if e.attribute == kind][:edit_limit]]
    scenes = list(dict.fromkeys(scene for edit in edits for scene in (edit.before, edit.after)))
    latents, patches = _scene_tensors(pipeline, scenes, jitters)
    where = {scene: index for index, scene in enumerate(scenes)}
    texts, first_row, row_count = _instruction_rows(edits)
    counts = [sum(edit.attribute == kind for edit in edits) for kind in KINDS]
    device = latents.device
    return EditExamples(
        latents=latents,
        patches=patches,
        before=torch.tensor([where[edit.before] for edit in edits], device=device),
        after=torch.tensor([where[edit.after] for edit in edits], device=device),
        first_row=first_row.to(device),
        row_count=row_count.to(device),
        offsets=torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=device),
        counts=torch.tensor(counts, device=device),
        rows=tokenize_instructions(pipeline, [*texts, ""], INSTRUCTION_WIDTH).to(device),
    )


def _below(limits: torch.Tensor) -> torch.Tensor:
    """A random whole number in 0..limit - 1 for each limit (B,), drawn on the device."""
    drawn = (torch.rand(limits.shape, device=limits.device) * limits).long()
    return torch.minimum(drawn, limits - 1)


class EditTrainer(FlowTrainer):
    """`FlowTrainer` on edits: the DiT also gets the reference, the text encoder also sees the picture."""

    def __init__(
        self, pipeline: LongCatImageEditPipeline, examples: EditExamples, recipe: EditRecipe, seed: int, compile: bool
    ) -> None:
        settings = FlowSettings(phases=recipe.phases, learning_rate=recipe.learning_rate, compile=compile)
        super().__init__(pipeline, examples, settings, seed)
        self.recipe = recipe
        self.picture_encoder = PictureEncoder(pipeline)
        self.losses: dict[int, Callable[..., torch.Tensor]] = {}

    @staticmethod
    def _trained(pipeline: LongCatImageEditPipeline) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from FlowTrainer._trained(pipeline)
        for name, p in pipeline.text_encoder.model.visual.named_parameters():
            yield f"text_encoder.model.visual.{name}", p

    def follow(self, recipe: EditRecipe) -> None:
        """Go on from the averaged weights with another recipe; what is compiled already is used again."""
        self.recipe, self.step = recipe, 0
        self.settings = replace(self.settings, phases=recipe.phases, learning_rate=recipe.learning_rate)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.average, strict=True):
                parameter.copy_(value)

    def _loss_function(self, slots: int) -> Callable[..., torch.Tensor]:
        if slots in self.losses:
            return self.losses[slots]
        txt_ids, img_ids = edit_position_ids(slots, TOKEN_SIDE, self.device)
        text_encoder, transformer = self.pipeline.text_encoder, self.pipeline.transformer

        def loss(
            noisy: torch.Tensor,
            reference: torch.Tensor,
            sigma: torch.Tensor,
            rows: TokenRows,
            patches: torch.Tensor,
            velocity: torch.Tensor,
        ) -> torch.Tensor:
            text = encode_instructions(text_encoder, rows, self.picture_encoder(patches), slots)
            tokens = torch.cat([noisy, reference], dim=1)
            drawn = transformer(tokens, text, sigma, img_ids, txt_ids, return_dict=False)[0]
            return F.mse_loss(drawn[:, : noisy.shape[1]].float(), velocity)

        self.losses[slots] = torch.compile(loss, dynamic=False) if self.settings.compile else loss
        return self.losses[slots]

    def _sigmas(self, size: int) -> torch.Tensor:
        """Noise levels (size,): logit-normal around the schedule's shift, or a bit below turbo's own eight."""
        if not self.recipe.turbo:
            louder = REHEARSED_NOISE if self.slots < TEXT_SLOTS else 0.0
            return torch.sigmoid(torch.randn(size, device=self.device) + self.mu + louder)
        level = torch.randint(1, TURBO_STEPS + 1, (size,), device=self.device)
        time = (level - TURBO_SPREAD * torch.rand(size, device=self.device)) / TURBO_STEPS
        return torch.sigmoid(torch.logit(time) + self.mu)

    def _batch(self, size: int) -> tuple[torch.Tensor | TokenRows, ...]:
        """Arguments of the loss, drawn on the device; every kind of edit and both languages equally often."""
        examples, device = self.examples, self.device
        kind = torch.randint(len(KINDS), (size,), device=device)
        edit = examples.offsets[kind] + _below(examples.counts[kind])
        language = torch.randint(len(LANGUAGES), (size,), device=device)
        row = examples.first_row[edit, language] + _below(examples.row_count[edit, language])
        dropped = torch.rand(size, device=device) < self.recipe.empty_share
        row = torch.where(dropped, len(examples.rows.ids) - 1, row)
        jitter = torch.randint(examples.latents.shape[1], (size,), device=device)
        before, clean = examples.before[edit], examples.latents[examples.after[edit], jitter]
        sigma, noise = self._sigmas(size), torch.randn_like(clean)
        mix = sigma[:, None, None]
        noisy = (1 - mix) * clean + mix * noise
        reference, patches = examples.latents[before, jitter], examples.patches[before, jitter]
        return noisy, reference, sigma, examples.rows.take(row), patches, noise - clean

    def train_phases(self, log: Callable[[str], None], log_every: int, mu: float) -> None:
        """Train for the recipe's time; `mu` is the log of the shift of the schedule that is trained for."""
        torch.manual_seed(self.seed + self.step)
        self.mu = mu
        for phase in self.recipe.phases:
            self._run_for(phase, log, log_every)

    def _rate(self, phase: EditPhase, step: int, share: float) -> float:
        """The learning rate after `share` of the phase's time and `step` of its steps."""
        warm = min(1.0, (step + 1) / self.settings.warmup)
        return self.settings.learning_rate * warm * (cosine(round(share * 1e6), 1_000_000, 1) if phase.decay else 1.0)

    def _run_for(self, phase: EditPhase, log: Callable[[str], None], log_every: int) -> None:
        began, self.slots, self.captured = time.monotonic(), phase.slots, None
        step_once = self._stepper(phase)
        self._synchronize()
        ready, first = time.monotonic(), self.step
        log(f"{phase.slots} text slots, batch {phase.batch}: ready after {ready - began:.0f} s")
        trained_for, mark = max(1.0, phase.seconds - (ready - began)), ready
        while (now := time.monotonic()) < ready + trained_for:
            self.rate.fill_(self._rate(phase, self.step - first, (now - ready) / trained_for))
            step_once()
            self.step += 1
            if self.step % SYNCHRONIZE_EVERY == 0:
                self._synchronize()
            if (self.step - first) % log_every == 0:
                loss, pace = self.loss_sum.item() / log_every, (time.monotonic() - mark) / log_every * 1000
                self.loss_sum.zero_()
                log(f"step {self.step} loss {loss:.4f} lr {self.rate.item():.2e} {pace:.1f} ms/step")
                mark = time.monotonic()
        self._synchronize()
