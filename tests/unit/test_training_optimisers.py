"""Optimisers of training: the learning rate of each step, missing packages, and the average."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import optimisers
from longcat_pack.longcat_backend.training.settings import TrainSettings

SETTINGS = TrainSettings(steps=14, warmup=3, learning_rate=0.8)


def rates(schedule: str) -> list[float]:
    settings = dataclasses.replace(SETTINGS, schedule=schedule)
    return [optimisers.learning_rate(settings, step) for step in range(1, 15)]


def test_the_rate_rises_during_the_warm_up_and_then_follows_its_schedule() -> None:
    assert rates("constant") == pytest.approx([0.2, 0.4, 0.6, *[0.8] * 11])
    assert rates("linear") == pytest.approx([0.2, 0.4, 0.6, *[0.8 * (1 - n / 11) for n in range(11)]])
    cosine = [0.4 * (1 + math.cos(math.pi * n / 11)) for n in range(11)]
    assert rates("cosine") == pytest.approx([0.2, 0.4, 0.6, *cosine])


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("prodigy", "prodigyopt", "pip install prodigyopt"),
        ("lion", "lion_pytorch", "pip install lion-pytorch"),
        ("adamw-8bit", "torchao.optim", "pip install torchao"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    name: str, module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LongCatError, match=f"'{name}' needs the Python package .*{command}"):
        optimisers.make(dataclasses.replace(SETTINGS, optimiser=name), [nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize(
    "page",
    ["locales/en/nodeDefs.json", "locales/zh/nodeDefs.json", "web/docs/LongCatTrainLora/en.md"]
    + ["web/docs/LongCatTrainLora/zh.md", "README.md", "README.zh.md"],
)
def test_the_texts_name_the_packages_that_do_not_come_with_the_pack(page: str, pack_dir: Path) -> None:
    text = (pack_dir / page).read_text(encoding="utf-8")
    required = (pack_dir / "requirements.txt").read_text(encoding="utf-8")
    packages = {package for _, _, package in optimisers._OPTIONAL.values() if package not in required}
    assert packages == {"prodigyopt", "lion-pytorch"}
    assert [package for package in packages if package not in text] == []
    assert "bitsandbytes" not in text


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit", "prodigy", "lion"])
def test_every_optimiser_goes_downhill_at_the_rate_that_is_set(name: str) -> None:
    settings = dataclasses.replace(SETTINGS, optimiser=name, weight_decay=0.0)
    parameter = nn.Parameter(torch.full((64, 64), 3.0))
    optimiser = optimisers.make(settings, [parameter])
    own = 1.0 if name == "prodigy" else 0.1  # Prodigy finds how far to go by itself, which takes some steps
    for rate, steps, moves in ((0.0, 1, False), (own, 30, True)):
        before = parameter.detach().clone()
        for _ in range(steps):
            optimisers.set_learning_rate(optimiser, rate)
            (parameter**2).sum().backward()
            with optimisers.without_compiling(settings):
                optimiser.step()
            optimiser.zero_grad()
        assert bool((parameter < before).all()) is moves


def test_8_bit_states_are_8_bit() -> None:
    settings = dataclasses.replace(SETTINGS, optimiser="adamw-8bit")
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimiser = optimisers.make(settings, [parameter])
    parameter.grad = torch.ones_like(parameter)
    with optimisers.without_compiling(settings):
        optimiser.step()
    tensors, _ = optimisers.exported(optimiser)
    assert tensors["0.exp_avg.codes"].dtype is torch.uint8


def test_a_state_of_another_optimiser_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    lion = optimisers.make(dataclasses.replace(SETTINGS, optimiser="lion"), [parameter])
    parameter.grad = torch.ones(4)
    lion.step()
    with pytest.raises(LongCatError, match="of another optimiser"):
        optimisers.restore(optimisers.make(SETTINGS, [parameter]), *optimisers.exported(lion))


def test_the_gradient_is_clipped_by_its_norm_and_the_norm_is_told() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    for limit, left in ((0.0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
            parameter.grad = torch.tensor([gradient])
        assert optimisers.clip(parameters, limit) == pytest.approx(5.0)
        assert [parameter.grad.item() for parameter in parameters] == pytest.approx(left)  # type: ignore[union-attr]


def test_the_average_follows_at_a_growing_decay() -> None:
    master = torch.zeros(1)
    average = optimisers.Average([master], decay=0.5)
    expected = 0.0
    for step in range(1, 12):
        master += 1
        average.update([master], step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(average.weights[0]) == pytest.approx(expected)


def test_prodigy_with_a_rate_of_another_optimiser_is_told(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    for rate, warned in ((1.0, False), (1e-4, True)):
        caplog.clear()
        optimisers.make(TrainSettings(optimiser="prodigy", learning_rate=rate), [parameter])
        assert ("set it to 1" in caplog.text) is warned
