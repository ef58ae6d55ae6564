"""What is drawn as before: the gradient against an independent one in fp64, and runs that end with the same bits."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from torch.func import functional_call

from longcat_pack.longcat_backend import flow, precision, quantisation
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import adapters, loop, preservation
from longcat_pack.longcat_backend.training.draws import seed_of
from longcat_pack.longcat_backend.training.loop import Events, Result
from longcat_pack.longcat_backend.training.objective import Shift
from longcat_pack.longcat_backend.training.preservation import EVERY, FEWEST, STEPS, Subject
from longcat_pack.longcat_backend.training.run import Run
from longcat_pack.longcat_backend.training.settings import TrainSettings

CPU = torch.device("cpu")
SCALE = 1.5
SETTINGS = TrainSettings(
    steps=6, batch=2, rank=4, alpha=6.0, targets="all", learning_rate=1e-2, seed=5, base_precision="fp32",
    checkpointing="none", save_every=0, validate_every=0, preservation_prompts=("a circle",), preservation_weight=2.5,
)  # fmt: skip


def train(folder: Path, data: tiny.Pictures, settings: TrainSettings = SETTINGS, **events: Any) -> Result:
    return loop.train(tiny.velocity_model(), data, settings, folder, Events(**events), CPU)


def bits(result: Result) -> list[torch.Tensor]:
    """Every number of a run's result."""
    tensors = [part for each in result.adapters for part in (each.down, each.up)]
    return [*tensors, torch.tensor(result.losses), torch.tensor(result.preservation)]


def same(one: Result, other: Result) -> bool:
    """Whether two runs ended with the same bits."""
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def prepared(data: tiny.Pictures, base: str = "fp32") -> Run:
    """A run before its first step, with B drawn at random after the base has drawn its subjects."""
    settings = dataclasses.replace(SETTINGS, base_precision=base)
    model = tiny.velocity_model()
    if base != "fp32":
        quantisation.quantise(model.transformer, "transformer", precision.PRESETS[base])
    beside = adapters.inject(model.transformer, "all", settings.rank, 6.0, settings.seed, CPU)
    for place, master in enumerate(beside.masters):
        master.data.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(place)) * 0.3)
    beside.publish()
    kept = preservation.draw(model, data, "base", settings.seed, CPU, flow.DEFAULT_SCHEDULER)
    return Run(model, beside, data, settings, Shift("batch", flow.DEFAULT_SCHEDULER, 4.0), CPU, kept)


def velocity(weights: dict[str, torch.Tensor], noisy: torch.Tensor, sigma: float, subject: Subject) -> torch.Tensor:
    """Of a latent (16, h, w) in fp64, by diffusers' own model with these weights; one patch after the other."""

    def tokens(latent: torch.Tensor) -> torch.Tensor:
        return torch.stack([latent[:, r : r + 2, c : c + 2].reshape(64) for r, c in corners])

    _, height, width = noisy.shape
    corners = [(r, c) for r in range(0, height, 2) for c in range(0, width, 2)]
    text = subject.text.double()
    images = [noisy] if subject.reference is None else [noisy, subject.reference.double()]
    places = [[m + 1, len(text) + r // 2, len(text) + c // 2] for m in range(len(images)) for r, c in corners]
    given = {
        "hidden_states": torch.cat([tokens(image) for image in images])[None],
        "timestep": torch.tensor([sigma], dtype=torch.float32),
        "encoder_hidden_states": text[None],
        "txt_ids": torch.tensor([[0, n, n] for n in range(len(text))], dtype=torch.float64),
        "img_ids": torch.tensor(places, dtype=torch.float64),
        "return_dict": False,
    }
    found = functional_call(tiny.transformer(torch.float64), weights, kwargs=given)[0][0, : len(corners)]
    drawn = torch.empty_like(noisy)
    for (r, c), token in zip(corners, found, strict=True):
        drawn = drawn.clone()
        drawn[:, r : r + 2, c : c + 2] = token.reshape(16, 2, 2)
    return drawn


def reference_loss(run: Run, base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], place: int) -> Any:
    """Of the point that accompanies a sample of the first step: the base draws up to it, in fp64."""
    subjects = run.data.subjects
    which, point = divmod(seed_of("preservation", SETTINGS.seed, 1, place) % (len(subjects) * STEPS), STEPS)
    subject, noise = subjects[which], torch.Generator().manual_seed(seed_of("preserved", SETTINGS.seed, which))
    width, height = (side // 8 for side in subject.size)
    drawn = torch.randn(1, 16, height, width, generator=noise)[0].double()
    levels = flow.sigmas(STEPS, height * width // 4, flow.DEFAULT_SCHEDULER).tolist()
    with torch.no_grad():
        for level, following in zip(levels[:point], levels[1:], strict=False):
            drawn = drawn + (following - level) * velocity(base, drawn, level, subject)
        wanted = velocity(base, drawn, levels[point], subject)
    return (velocity(merged, drawn, levels[point], subject) - wanted).square().mean()


@pytest.mark.parametrize(("base", "edit"), [("fp32", False), ("fp32", True), ("int8-quanto", False)])
def test_the_gradient_is_that_of_the_distance_to_the_base(base: str, edit: bool, tmp_path: Path) -> None:
    run = prepared(tiny.preserving(tmp_path, edit=edit), base)
    whole = [run.gradients(((0, 1), (3,)))[1], [master.grad.clone() for master in run.adapters.masters]]  # type: ignore[union-attr]
    run.adapters.forget_gradients()
    run.preserved = None
    run.gradients(((0, 1), (3,)))
    weights = {
        name.replace(".base_layer", ""): (p.dequantize() if quantisation.is_packed(p) else p).detach().double()
        for name, p in run.model.transformer.named_parameters()
        if ".lora_" not in name
    }
    masters = [master.detach().double().requires_grad_(True) for master in run.adapters.masters]
    merged = dict(weights)
    for name, down, up in zip(run.adapters.names, masters[::2], masters[1::2], strict=True):
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + SCALE * up @ down
    # Of the three samples of the first step the second has a point, which counts for two.
    loss = reference_loss(run, weights, merged, place=1)
    (SETTINGS.preservation_weight * EVERY * loss / 3).backward()
    assert whole[0] == pytest.approx(loss.item(), rel=1e-4)
    for wanted, master, both in zip(masters, run.adapters.masters, whole[1], strict=True):
        assert wanted.grad is not None and master.grad is not None
        assert float((both - master.grad - wanted.grad).norm() / wanted.grad.norm()) <= 1e-3


def test_the_adapters_begin_where_nothing_is_lost(tmp_path: Path) -> None:
    result = train(tmp_path / "run", tiny.preserving(tmp_path / "cache"))
    assert result.preservation[0][1] < 1e-12  # a forward of two points rounds otherwise than one
    assert all(loss > 1e-6 for _, loss in result.preservation[1:])


def test_so_many_samples_share_a_point_in_every_step_or_over_the_steps(tmp_path: Path) -> None:
    kept = prepared(tiny.preserving(tmp_path)).preserved
    assert kept is not None
    for total in (1, 2, 3, 4):
        places = [(step, place) for step in range(1, 13) for place in range(total)]
        chosen = [place for place in places if kept.choose(*place) is not None]
        assert len(chosen) == len(places) / EVERY
        assert all(kept.choose(*place).noisy.equal(kept.choose(*place).noisy) for place in chosen)  # type: ignore[union-attr]


def test_less_is_lost_with_more_weight(tmp_path: Path) -> None:
    lost = {}
    for weight in (1e-6, 30.0):
        settings = dataclasses.replace(SETTINGS, steps=40, preservation_weight=weight)
        lost[weight] = train(tmp_path / str(weight), tiny.preserving(tmp_path / "cache"), settings).preservation[-8:]
    assert sum(loss for _, loss in lost[30.0]) < 0.5 * sum(loss for _, loss in lost[1e-6])


def test_a_weight_of_zero_is_no_preservation(tmp_path: Path) -> None:
    off = train(
        tmp_path / "off", tiny.preserving(tmp_path / "none"), dataclasses.replace(SETTINGS, preservation_prompts=())
    )
    zero = train(
        tmp_path / "0", tiny.preserving(tmp_path / "none"), dataclasses.replace(SETTINGS, preservation_weight=0.0)
    )
    assert same(off, zero) and not zero.preservation
    assert not (tmp_path / "none").exists()
    assert not same(off, train(tmp_path / "on", tiny.preserving(tmp_path / "cache")))


@pytest.mark.parametrize("cache", ["kept", "deleted"])
def test_an_interrupted_run_ends_with_the_same_bits(cache: str, tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", tiny.preserving(tmp_path / "cache"))
    place, answers = tmp_path / "halves", iter([False, False, True])
    first = train(place, tiny.preserving(tmp_path / "cache"), should_stop=lambda: next(answers))
    assert first.stopped and first.step == 3
    if cache == "deleted":
        shutil.rmtree(tmp_path / "cache")
    assert same(train(place, tiny.preserving(tmp_path / "cache")), straight)


def test_the_base_draws_each_subject_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    train(tmp_path / "first", tiny.preserving(tmp_path / "cache"), on_preparing=lambda *counts: told.append(counts))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def fail(*args: Any) -> Any:
        raise AssertionError("drawn again")

    monkeypatch.setattr(preservation, "_trajectory", fail)
    train(tmp_path / "second", tiny.preserving(tmp_path / "cache"))
    other = dataclasses.replace(SETTINGS, seed=6)
    with pytest.raises(AssertionError, match="drawn again"):
        train(tmp_path / "third", tiny.preserving(tmp_path / "cache"), other)


def test_a_trajectory_that_is_lost_ends_the_run_with_words_and_is_drawn_anew(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", tiny.preserving(tmp_path / "cache"))

    def lose(progress: loop.Progress) -> None:
        if progress.step == 2:
            shutil.rmtree(tmp_path / "cache")

    settings = dataclasses.replace(SETTINGS, save_every=1)
    with pytest.raises(LongCatError, match="is gone or damaged.*Queue the graph again"):
        train(tmp_path / "run", tiny.preserving(tmp_path / "cache"), settings, on_step=lose)
    assert same(train(tmp_path / "run", tiny.preserving(tmp_path / "cache"), settings), whole)


def test_other_prompts_and_weights_are_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path / "run", tiny.preserving(tmp_path / "cache"), dataclasses.replace(SETTINGS, steps=1))
    for change, told in (
        ({"preservation_prompts": ("a square",)}, "preservation_prompts"),
        ({"preservation_weight": 1.0}, "preservation_weight: 2.5 -> 1.0"),
    ):
        with pytest.raises(LongCatError, match=told):
            train(tmp_path / "run", tiny.preserving(tmp_path / "cache"), dataclasses.replace(SETTINGS, **change))


@pytest.mark.parametrize("count", [1, 3, 63, 64, 100])
def test_every_prompt_is_drawn_equally_often_and_at_least_so_many_in_all(count: int) -> None:
    prompts = [str(number) for number in range(count)]
    drawn = preservation.rounds(prompts)
    times = {prompt: sum(each == prompt for _, each in drawn) for prompt in prompts}
    assert len(set(times.values())) == 1 and FEWEST <= len(drawn) < FEWEST + count
    # Two rounds of the same prompt take different pictures.
    assert len(set(drawn)) == len(drawn)
