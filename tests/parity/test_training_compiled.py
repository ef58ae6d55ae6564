"""Compiled blocks and the modulation table: neither changes a gradient or a loss, and both need less memory.

Blocks are compiled by a backend of torch that divides them into forward and backward as the default one does, and
needs no compiler for C++.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_training as tiny
import torch
from torch._functorch import config as functorch_config

from longcat_pack.longcat_backend import memory
from longcat_pack.longcat_backend.errors import LongCatError
from longcat_pack.longcat_backend.modulation import is_modulation
from longcat_pack.longcat_backend.training import adapters, engine, tabulated
from longcat_pack.longcat_backend.training.compiled import CompiledBlocks
from longcat_pack.longcat_backend.training.run import Run
from longcat_pack.longcat_backend.training.settings import TrainSettings
from parity.training_reference import CPU, compare, curve, mixed, prepared, reference_weights

SAME = ((0, 2, 3),)  # pictures of one size, so that nothing is compiled twice


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "BACKEND", "aot_eager_decomp_partition")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def kept(run: Run) -> int:
    """Bytes that a forward keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.gradients(SAME)
    return sum(found.values())


def test_compiled_blocks_keep_what_they_may_and_their_gradients_equal_the_reference() -> None:
    """One setting after the other in one process: code that was compiled for another one must not be used."""
    found = {}
    for checkpointing in ("every-second", "block"):
        run = prepared(mixed(), checkpointing=checkpointing, compile=True)
        compare(run, reference_weights(run), SAME)
        found[checkpointing] = kept(run)
    assert found["block"] <= 1.15 * kept(prepared(mixed(), checkpointing="block"))
    assert found["block"] < 0.5 * found["every-second"] < 0.5 * 0.8 * kept(prepared(mixed(), checkpointing="none"))
    assert functorch_config.activation_memory_budget == 1.0  # what others compile is theirs to set


def test_gradients_of_compiled_blocks_beside_an_int8_base_equal_the_reference() -> None:
    run = prepared(mixed(), base="int8-quanto", compile=True)
    compare(run, reference_weights(run), SAME)


def test_a_process_may_train_any_number_of_times() -> None:
    class Block(torch.nn.Module):
        def forward(self, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return one * 2, other + one

    transformer = SimpleNamespace(single_transformer_blocks=[single := Block()])
    one, other = torch.ones(3), torch.ones(3)
    for _ in range(2 * torch._dynamo.config.recompile_limit):
        blocks = CompiledBlocks(transformer, 0.0, "eager")
        for block in (Block(), single):
            assert [float(result.sum()) for result in blocks(block, one, other)] == [6, 6]


def test_the_loss_curve_of_compiled_blocks_is_that_of_the_others(tmp_path: Path) -> None:
    data = tiny.Pictures([tiny.example(seed) for seed in range(4)], dropout=0.5)
    plain = curve(tmp_path / "plain", data=data, checkpointing="none")
    assert curve(tmp_path / "compiled", data=data, compile=True) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("base", ["bf16", "int8-quanto"])
def test_the_table_changes_no_bit_of_any_loss(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture of a batch has a text of its own length, so several forwards come before one backward pass."""
    monkeypatch.setattr(memory, "_STREAMING", ("cuda", "xpu", "cpu"))  # the CPU stands for the device as well
    data = mixed()
    for place, each in enumerate(data.examples):
        data.examples[place] = dataclasses.replace(each, text=torch.randn(8 + place, tiny.WIDTH))
    options: list[dict[str, Any]] = [{"modulation_table": False}, {}]
    if base == "bf16":
        options += [{"checkpointing": "none"}, {"offload": "block", "offload_stream": False}]
    models = [tiny.velocity_model(torch.bfloat16) for _ in options]
    runs = [
        curve(tmp_path / str(number), base, models[number], data, **options[number]) for number in range(len(options))
    ]
    assert all(run == runs[0] for run in runs)
    left = [[name for name, _ in model.transformer.named_parameters() if "norm1.linear" in name] for model in models]
    assert left[0] and not any(left[1:])


def test_the_table_answers_every_noise_level_and_computes_those_that_it_does_not_know() -> None:
    plain, tabulated_ = tiny.velocity_model(torch.bfloat16), tiny.velocity_model(torch.bfloat16)
    tabulated.tabulate(tabulated_.transformer, CPU)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1, 16, 4, 4, generator=generator).bfloat16()
    text = torch.randn(1, tiny.TOKENS, tiny.WIDTH, generator=generator).bfloat16()
    levels = [0.001, 0.5, 1.0, *torch.rand(50, generator=generator).clamp(min=0.001).tolist(), 1e-5]
    table = tabulated_.transformer.time_embed
    computed: list[torch.Tensor] = []
    compute = table._computed
    table._computed = lambda timestep: computed.append(timestep) or compute(timestep)
    with torch.no_grad():
        for level in levels:
            sigma = torch.tensor([level])
            assert torch.equal(tabulated_(samples, sigma, text), plain(samples, sigma, text)), level
    assert len(computed) == 1  # of the last one


def test_the_table_is_refused_where_a_modulation_layer_may_change() -> None:
    model = tiny.velocity_model(torch.bfloat16)
    model.transformer.single_transformer_blocks[1].norm.linear = torch.nn.Identity()
    with pytest.raises(LongCatError, match=r"'single_transformer_blocks.1.norm.linear' is a Identity"):
        tabulated.tabulate(model.transformer, CPU)


def test_no_target_is_a_modulation_layer_and_fp32_has_no_table() -> None:
    names = [name for name, _ in tiny.transformer().named_modules() if is_modulation(name)]
    assert len(names) == 2 * 2 + 3 + 1
    assert not [name for name in names if any(pattern.fullmatch(name) for pattern in adapters.PATTERNS.values())]
    assert tabulated.wanted(TrainSettings(), torch.bfloat16) and not tabulated.wanted(TrainSettings(), torch.float32)
