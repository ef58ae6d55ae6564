"""The grid shows every picture at its place, and a number where a label cannot be drawn."""

import pytest
import torch

from longcat_pack.longcat_backend import fonts, labelled_grid

COLOURS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0))


def pictures(count: int) -> list[torch.Tensor]:
    return [torch.tensor(COLOURS[index]).expand(64, 96, 3) for index in range(count)]


def has(grid: torch.Tensor, colour: tuple[float, float, float]) -> list[tuple[int, int]]:
    """Where a colour is: (row, column) of its first and its last pixel."""
    places = (grid == torch.tensor(colour)).all(-1).nonzero().tolist()
    return [tuple(places[0]), tuple(places[-1])]


def test_pictures_lie_in_rows_and_columns_whole() -> None:
    grid = labelled_grid.as_tensor(labelled_grid.grid(pictures(4), ["one", "two"], ["a", "b"]))[0]
    places = [has(grid, colour) for colour in COLOURS]
    for (top, left), (bottom, right) in places:
        assert (bottom - top + 1, right - left + 1) == (64, 96)
    assert places[0][0][0] == places[1][0][0] < places[2][0][0] == places[3][0][0]
    assert places[0][0][1] == places[2][0][1] < places[1][0][1] == places[3][0][1]


def test_what_is_still_to_come_is_left_empty_and_the_size_stays() -> None:
    rows, columns = ["one", "two"], ["a", "b"]
    assert labelled_grid.grid(pictures(1), rows, columns).size == labelled_grid.grid(pictures(4), rows, columns).size


def test_a_long_label_takes_lines_and_widens_nothing() -> None:
    short = labelled_grid.grid(pictures(1), ["one"], ["a"])
    long = labelled_grid.grid(pictures(1), ["one " * 100], ["a"])
    assert long.width == short.width and long.height > short.height


def test_without_a_chinese_font_a_row_has_its_number_and_the_legend_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    latin = fonts.Fonts(fonts.fonts(12).latin, None)
    monkeypatch.setattr(labelled_grid, "fonts", lambda size: latin)
    assert labelled_grid.grid(pictures(1), ["红色"], ["a"]).tobytes() == _row_of("1").tobytes()
    assert labelled_grid.legend(["a star", "红色"]) == "1: a star\n2: 红色"


def _row_of(text: str) -> labelled_grid.Image.Image:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled_grid, "_numbered", lambda index, label: text)
        return labelled_grid.grid(pictures(1), ["x"], ["a"])


def test_a_picture_and_back_keeps_its_values() -> None:
    values = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(0)) / 255
    assert torch.allclose(labelled_grid.as_tensor(labelled_grid.as_image(values))[0], values)
