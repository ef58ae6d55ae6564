"""The gradient of every adapter against an independent one in fp64, with each option that must not change it."""

from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from longcat_pack.longcat_backend import memory, precision, quantisation
from longcat_pack.longcat_backend.training import offload
from parity.training_reference import compare, curve, mixed, prepared, reference_weights


@pytest.mark.parametrize("checkpointing", ["none", "block", "every-second"])
def test_gradients_equal_the_reference_with_and_without_recomputation(checkpointing: str) -> None:
    run = prepared(mixed(), checkpointing=checkpointing)
    compare(run, reference_weights(run))


def test_gradients_of_edit_pairs_equal_the_reference() -> None:
    run = prepared(mixed(edit=True))
    compare(run, reference_weights(run))


@pytest.mark.parametrize("name", ["int8-quanto", "int4-quanto"])
def test_gradients_beside_a_quantised_base_equal_those_of_its_dequantised_weights(name: str) -> None:
    run = prepared(mixed(), base=name)
    plain = dict(tiny.transformer(torch.float64).named_parameters())
    base = reference_weights(run)
    assert not torch.equal(
        base["transformer_blocks.0.attn.to_q.weight"], plain["transformer_blocks.0.attn.to_q.weight"]
    )
    compare(run, base)


@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_gradients_with_group_offload_equal_the_reference(
    level: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "_STREAMING", ("cuda", "xpu", "cpu"))  # the CPU stands for the device as well
    run = prepared(mixed(), checkpointing=checkpointing, offload=level, offload_stream=False)
    assert list(offload.groups(run.model.transformer))
    assert ("set checkpointing to 'block'" in caplog.text) is (checkpointing == "none")
    compare(run, reference_weights(run))


def test_loss_curves_are_the_same_with_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STREAMING", ("cuda", "xpu", "cpu"))
    plain = curve(tmp_path / "plain", checkpointing="none")
    assert len(plain) == 20 and max(plain) < 10
    for number, options in enumerate(
        (
            {"checkpointing": "block"},
            {"checkpointing": "every-second"},
            {"checkpointing": "block", "offload": "block", "offload_stream": False},
            {"checkpointing": "none", "offload": "leaf", "offload_stream": False},
        )
    ):
        assert curve(tmp_path / str(number), **options) == pytest.approx(plain, rel=1e-5), options


def test_the_loss_curve_beside_an_int8_base_is_that_of_its_dequantised_weights(tmp_path: Path) -> None:
    quantised, plain = tiny.velocity_model(), tiny.velocity_model()
    quantisation.quantise(quantised.transformer, "transformer", precision.PRESETS["int8-quanto"])
    with torch.no_grad():
        for name, parameter in quantised.transformer.named_parameters():
            if quantisation.is_packed(parameter):
                plain.transformer.get_parameter(name).copy_(parameter.dequantize())
    expected = curve(tmp_path / "plain", model=plain)
    assert curve(tmp_path / "int8", base="int8-quanto") == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(curve(tmp_path / "fp32"), rel=1e-4)


@pytest.mark.parametrize("blocks", [1, 2])
def test_group_offload_has_weights_there_when_they_are_used_and_nowhere_else(
    blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing moves, so the groups' own calls stand for it."""
    monkeypatch.setattr(memory, "_STREAMING", ("cuda", "xpu", "cpu"))
    there: set[int] = set()
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: there.add(id(group)))
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: there.discard(id(group)))
    run = prepared(mixed(), checkpointing="block", offload="block", offload_stream=False, offload_blocks=blocks)
    transformer = run.model.transformer
    used: list[int] = []
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        group = offload._hook(block).group

        def check(module: nn.Module, inputs: object, group: Any = group) -> None:
            assert id(group) in there
            used.append(len(there))

        block.attn.register_forward_pre_hook(check)
    run.gradients(((0,),))
    assert len(used) == 2 * 5  # forward and recomputation of five blocks
    assert max(used) == 2  # the blocks' group and that of what is outside the blocks
    assert not there
