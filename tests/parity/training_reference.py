"""The gradient of every adapter in fp64, independently, and runs of the tiny model to hold against it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from torch.func import functional_call

from longcat_pack.longcat_backend import flow, precision, quantisation
from longcat_pack.longcat_backend.training import adapters, engine, loop
from longcat_pack.longcat_backend.training.draws import draw
from longcat_pack.longcat_backend.training.objective import Shift
from longcat_pack.longcat_backend.training.run import Run
from longcat_pack.longcat_backend.training.settings import TrainSettings
from longcat_pack.longcat_backend.transformer import VelocityModel

CPU = torch.device("cpu")
RANK, ALPHA = 4, 6.0  # a scale of 1.5
BATCHES = ((0, 1, 2), (5,))
SEED = 11


def prepared(data: tiny.Pictures, base: str = "fp32", **options: Any) -> Run:
    """A run before its first step, with B drawn at random, since at its zeros A has no gradient."""
    settings = TrainSettings(
        batch=3, accumulation=2, rank=RANK, alpha=ALPHA, targets="all", seed=SEED, base_precision=base, **options
    )
    model = tiny.velocity_model()
    if precision.PRESETS[base].backend:
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS[base])
    beside = adapters.inject(model.transformer, "all", RANK, ALPHA, SEED, CPU)
    engine.place(model.transformer, settings, CPU, Path())
    engine.recompute(model.transformer, settings)
    with torch.no_grad():
        for place, master in enumerate(beside.masters):
            master.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(place)) * 0.3)
    beside.publish()
    return Run(model, beside, data, settings, Shift("batch", flow.DEFAULT_SCHEDULER, 4.0), CPU)


def reference_weights(run: Run) -> dict[str, torch.Tensor]:
    """The base in fp64 by official names; quantised weights as the numbers that they stand for."""
    weights = {}
    for name, parameter in run.model.transformer.named_parameters():
        if ".lora_" not in name:
            plain = parameter.dequantize() if quantisation.is_packed(parameter) else parameter
            weights[name.replace(".base_layer", "")] = plain.detach().double()
    return weights


def packed(latent: torch.Tensor) -> torch.Tensor:
    """Tokens of a latent (16, h, w), patch by patch, written out."""
    _, height, width = latent.shape
    tokens = [
        latent[:, row : row + 2, column : column + 2].reshape(64)
        for row in range(0, height, 2)
        for column in range(0, width, 2)
    ]
    return torch.stack(tokens)


def ids(length: int, modality: int, height: int, width: int) -> torch.Tensor:
    """Positions of an image's tokens after a text of ``length``."""
    rows = [[modality, length + r, length + c] for r in range(height // 2) for c in range(width // 2)]
    return torch.tensor(rows, dtype=torch.float64)


def reference_gradients(
    run: Run, base: dict[str, torch.Tensor], batches: Sequence[Sequence[int]]
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of A and B in fp64: diffusers' model with W + scale · B A for W, sample by sample."""
    model = tiny.transformer(torch.float64)
    masters = [master.detach().double().requires_grad_(True) for master in run.adapters.masters]
    merged = dict(base)
    for name, down, up in zip(run.adapters.names, masters[::2], masters[1::2], strict=True):
        merged[f"{name}.weight"] = base[f"{name}.weight"] + ALPHA / RANK * up @ down
    total = torch.zeros((), dtype=torch.float64)
    indices = [index for batch in batches for index in batch]
    for place, index in enumerate(indices):
        one = run.data[index]
        chance = draw(one.latent.shape, SEED, run.step + 1, place)
        _, height, width = one.latent.shape
        mu = 0.5 + (1.15 - 0.5) * (height * width / 4 - 256) / (4096 - 256)
        sigma = 1 / (1 + math.exp(-(chance.normal + mu)))
        clean, noise = one.latent.double(), chance.noise.double()
        text = (one.empty if chance.uniform < run.data.dropout else one.text).double()
        tokens = packed((1 - sigma) * clean + sigma * noise)
        image_ids = ids(len(text), 1, height, width)
        if one.reference is not None:
            tokens = torch.cat([tokens, packed(one.reference.double())])
            image_ids = torch.cat([image_ids, ids(len(text), 2, height, width)])
        text_ids = torch.tensor([[0, place, place] for place in range(len(text))], dtype=torch.float64)
        velocity = functional_call(
            model,
            merged,
            kwargs={
                "hidden_states": tokens[None],
                "timestep": torch.tensor([sigma], dtype=torch.float32),
                "encoder_hidden_states": text[None],
                "txt_ids": text_ids,
                "img_ids": image_ids,
                "return_dict": False,
            },
        )[0][0, : height * width // 4]
        errors = (velocity - packed(noise - clean)).square()
        if one.mask is not None:
            weights = packed(one.mask.double().expand(16, -1, -1))
            total = total + (weights * errors).sum() / weights.sum()
        else:
            total = total + errors.mean()
    loss = total / len(indices)
    loss.backward()
    return loss.item(), [master.grad for master in masters if master.grad is not None]


def compare(run: Run, base: dict[str, torch.Tensor], batches: Sequence[Sequence[int]] = BATCHES) -> None:
    """Every adapter's gradient is within 1e-4 of the reference, relative to its own norm."""
    expected_loss, expected = reference_gradients(run, base, batches)
    loss, _ = run.gradients(batches)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert len(expected) == len(run.adapters.masters) == 2 * (2 * 12 + 3 * 5)
    names = [name for name in run.adapters.names for _ in "AB"]
    for name, master, wanted in zip(names, run.adapters.masters, expected, strict=True):
        assert master.grad is not None and wanted.norm() > 0
        assert float((master.grad.double() - wanted).norm() / wanted.norm()) <= 1e-4, name


def mixed(edit: bool = False) -> tiny.Pictures:
    """Pictures of two sizes, some with masks, with half of the captions dropped; with references for edit."""
    examples = [tiny.example(n, edit=edit, masked=n == 1) for n in range(5)] + [tiny.example(9, 4, 8, edit=edit)]
    return tiny.Pictures(examples, dropout=0.5)


def curve(
    folder: Path,
    base: str = "fp32",
    model: VelocityModel | None = None,
    data: tiny.Pictures | None = None,
    **options: Any,
) -> list[float]:
    """The losses of the first 20 steps."""
    settings = TrainSettings(
        steps=20, batch=2, rank=RANK, alpha=ALPHA, targets="all", learning_rate=5e-3, base_precision=base, **options
    )
    model = model or tiny.velocity_model()
    if precision.PRESETS[base].backend:
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS[base])
    result = loop.train(model, data or mixed(), settings, folder, loop.Events(), CPU)
    return [loss for _, loss in result.losses]
