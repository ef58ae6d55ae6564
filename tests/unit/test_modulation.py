"""The modulation table by itself: which layers, what it answers, what it keeps."""

from collections.abc import Sequence

import pytest
import torch

from longcat_pack.longcat_backend import modulation
from longcat_pack.longcat_backend.modulation import ModulationTable, is_modulation

LAYER = "norm_out.linear"


def embed(timesteps: torch.Tensor) -> torch.Tensor:
    return timesteps[:, None].expand(-1, 4)


def double(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [2 * value for value in inputs]


def ask(table: ModulationTable, level: float, schedule: torch.Tensor | None = None, batch: int = 1) -> torch.Tensor:
    timesteps = torch.full((batch,), level)
    with table.at(timesteps, schedule, timesteps, embed):
        row = table.row(LAYER, embed(timesteps), double)
    assert row is not None
    return row


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.9.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.19.norm.linear",
        "norm_out.linear",
        "double_blocks.0.img_mod.lin",
        "double_blocks.0.txt_mod.lin",
        "single_blocks.3.modulation.lin",
        "final_layer.adaLN_modulation.1",
    ],
)
def test_the_layers_of_the_noise_level(name: str) -> None:
    assert is_modulation(name)


@pytest.mark.parametrize("name", ["x_embedder", "time_embed.timestep_embedder.linear_1", "single_blocks.0.linear1"])
def test_other_layers_are_no_modulation(name: str) -> None:
    assert not is_modulation(name)


def test_a_row_is_the_layers_result_for_the_whole_batch() -> None:
    assert torch.equal(ask(ModulationTable(), 0.5, batch=3), torch.full((3, 4), 1.0))


def test_outside_a_noise_level_the_layer_computes() -> None:
    assert ModulationTable().row(LAYER, torch.ones(1, 4), double) is None


def test_a_conditioning_of_another_batch_size_is_not_answered() -> None:
    """Such as that of models which add a noise level for their reference images."""
    table, timesteps = ModulationTable(), torch.tensor([0.5])
    with table.at(timesteps, None, timesteps, embed):
        assert table.row(LAYER, torch.ones(2, 4), double) is None


def test_an_error_inside_leaves_no_noise_level_behind() -> None:
    table, timesteps = ModulationTable(), torch.tensor([0.5])
    with pytest.raises(MemoryError), table.at(timesteps, None, timesteps, embed):
        raise MemoryError
    assert table.row(LAYER, torch.ones(1, 4), double) is None


def test_the_rows_of_many_schedules_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulation, "MOST_LEVELS", 8)
    table = ModulationTable()
    for run in range(1, 20):
        schedule = torch.linspace(1, 0.1, 5) / run
        assert torch.equal(ask(table, float(schedule[0]), schedule), 2 * embed(schedule[:1]))
        assert len(table._rows[LAYER]) <= 8


def test_a_version_keeps_its_rows_and_another_drops_them() -> None:
    table = ModulationTable()
    table.sync("a")
    ask(table, 0.5)
    table.sync("a")
    assert table._rows
    table.sync("b")
    assert not table._rows
    ask(table, 0.5)
    table.sync(None)
    table.sync("b")
    assert not table._rows
