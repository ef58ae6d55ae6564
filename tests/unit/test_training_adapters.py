"""Adapters: where they go, that they change nothing at first, and that what is exported is what was learnt."""

from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch

from longcat_pack.longcat_backend import lora_files, official
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.training import adapters, engine, selfcheck
from longcat_pack.longcat_backend.transformer import VelocityModel, empty_transformer

CPU = torch.device("cpu")


def forward(model: VelocityModel) -> torch.Tensor:
    one = tiny.example(3)
    with torch.no_grad():
        return model(one.latent[None].to(model.dtype), torch.tensor([0.7]), one.text[None].to(model.dtype)).float()


def learnt(model: VelocityModel, targets: str = "all", rank: int = 3, alpha: float = 5.0) -> adapters.Adapters:
    """Adapters with weights that do something."""
    beside = adapters.inject(model.transformer, targets, rank, alpha, 0, CPU)
    with torch.no_grad():
        for place, master in enumerate(beside.masters):
            master.copy_(torch.randn(master.shape, generator=torch.Generator().manual_seed(place)) * 0.1)
    beside.publish()
    return beside


@pytest.mark.parametrize(("targets", "count"), [("attention", 100), ("official", 180), ("all", 220)])
def test_targets_at_full_size(targets: str, count: int) -> None:
    names = adapters.target_layers(empty_transformer(official.TRANSFORMER), targets)
    assert len(names) == count and not [name for name in names if "norm" in name or "embed" in name]


def test_fresh_adapters_change_nothing_and_follow_the_seed() -> None:
    bare = forward(tiny.velocity_model())
    drawn = []
    for seed in (1, 1, 2):
        model = tiny.velocity_model()
        beside = adapters.inject(model.transformer, "all", 4, 4.0, seed, CPU)
        assert torch.equal(forward(model), bare)
        drawn.append(beside.masters[0].detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_only_adapters_need_gradients_and_their_masters_are_fp32() -> None:
    model = tiny.velocity_model(torch.bfloat16)
    beside = adapters.inject(model.transformer, "attention", 4, 4.0, 0, CPU)
    trained = {name for name, value in model.transformer.named_parameters() if value.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {master.dtype for master in beside.masters} == {torch.float32}
    assert {value.dtype for value in beside.live()} == {torch.bfloat16} == {model.dtype}


def test_without_adapters_the_model_is_the_base_and_with_them_it_is_trained_on() -> None:
    bare, model = forward(tiny.velocity_model()), tiny.velocity_model()
    beside = learnt(model)
    worn = forward(model)
    with adapters.disabled(model):
        assert torch.equal(forward(model), bare)
    assert torch.equal(forward(model), worn) and not torch.equal(worn, bare)
    assert all(value.requires_grad for value in beside.live())


def test_other_weights_are_shown_for_a_while() -> None:
    model = tiny.velocity_model()
    beside = learnt(model)
    worn = forward(model)
    with beside.showing([torch.zeros_like(master) for master in beside.masters]):
        assert torch.equal(forward(model), forward(tiny.velocity_model()))
    assert torch.equal(forward(model), worn)


def test_what_is_exported_is_what_was_learnt(tmp_path: Path) -> None:
    model = tiny.velocity_model()
    exported = learnt(model).exported()
    merged = tiny.velocity_model()
    with torch.no_grad():
        for each in exported:
            merged.transformer.get_parameter(f"{each.module}.weight").add_(each.scale * each.up @ each.down)
    torch.testing.assert_close(forward(merged), forward(model), rtol=1e-4, atol=1e-5)
    lora_files.write(tmp_path / "zorb.safetensors", exported, dtype=torch.float32)
    selfcheck.check_file(model, tmp_path / "zorb.safetensors", exported, CPU)


def test_rounding_in_the_file_is_no_damage(tmp_path: Path) -> None:
    """Of rank 1, whose change of a single input can be as small as its own rounding."""
    model = tiny.velocity_model()
    exported = learnt(model, rank=1).exported()
    for each in exported:
        probe = torch.randn(each.down.shape[1], generator=torch.Generator().manual_seed(0))
        each.down.sub_(0.999 * (each.down @ probe)[:, None] * probe / probe.square().sum())
    lora_files.write(tmp_path / "zorb.safetensors", exported)
    selfcheck.check_file(model, tmp_path / "zorb.safetensors", exported, CPU)


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = tiny.transformer()
    with pytest.raises(LongCatError, match="inference mode"):
        adapters.inject(model, "all", 4, 4.0, 0, CPU)


def test_a_model_without_these_layers_is_refused() -> None:
    with pytest.raises(LongCatError, match="has no layer that the targets 'official' name"):
        adapters.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), "official", 4, 4.0, 0, CPU)


def test_recomputation_that_gives_other_gradients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.velocity_model()
    beside = adapters.inject(model.transformer, "all", 4, 4.0, 0, CPU)
    before = [value.detach().clone() for value in beside.live()]
    selfcheck.check_gradients(model, beside, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, beside.live(), strict=True))
    assert len(model.transformer.transformer_blocks) == 2 and len(model.transformer.single_transformer_blocks) == 3

    def wrong(block: Any, *inputs: Any, **settings: Any) -> Any:
        return block(inputs[0] * 1.01, *inputs[1:])

    monkeypatch.setattr(engine, "checkpoint", wrong)
    with pytest.raises(LongCatError, match="gradient self-check failed"):
        selfcheck.check_gradients(model, beside, CPU)
