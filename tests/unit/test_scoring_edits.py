"""Instructions ask for one change each, and their scorer tells what was changed and what was kept."""

from collections import Counter

import numpy as np
import pytest

from scoring import scenes
from scoring.edits import (
    VALUES,
    Edit,
    edits_of,
    held_out_edits,
    held_out_tasks,
    instructions,
    score_edit,
    summarise_edits,
    training_edits,
)

TASKS = held_out_tasks()
SCENE = scenes.Scene("white", "red", "circle", "small", "left")


def other_value(edit: Edit, attribute: str) -> str:
    """A value of another attribute than the edit's that its picture does not show; for a colour, no colour of it."""
    taken = {edit.after.background, edit.after.colour, getattr(edit.after, attribute)}
    return next(value for value in VALUES[attribute] if value not in taken)


def test_the_picture_that_was_asked_for_scores_fully_right():
    rates = summarise_edits([score_edit(task.wanted(), task.edit) for task in TASKS[::3]])
    assert rates == dict.fromkeys(["asked", *scenes.ATTRIBUTES, "all"], 1.0)


def test_an_unchanged_picture_keeps_everything_and_does_nothing_asked():
    rates = summarise_edits([score_edit(task.picture(), task.edit) for task in TASKS[::3]])
    assert rates == {"asked": 0.0, **dict.fromkeys(scenes.ATTRIBUTES, 1.0), "all": 0.0}


@pytest.mark.parametrize("attribute", scenes.ATTRIBUTES)
def test_another_attribute_changed_is_the_only_one_not_kept(attribute):
    checked = 0
    for task in TASKS[::7]:
        if task.edit.attribute == attribute:
            continue
        spoilt = scenes.render(Edit(task.edit.after, attribute, other_value(task.edit, attribute)).after, task.jitter)
        assert [name for name, right in score_edit(spoilt, task.edit).items() if not right] == [attribute]
        checked += 1
    assert checked > 10


def test_a_blank_picture_keeps_the_background_alone():
    blank = np.full((128, 128, 3), scenes.PALETTE["white"], dtype=np.uint8)
    score = score_edit(blank, Edit(SCENE, "colour", "blue"))
    assert score == {"background": True, "asked": False, "shape": False, "size": False, "place": False}


def test_no_scores_have_no_rates():
    with pytest.raises(ValueError, match="none"):
        summarise_edits([])


def test_held_out_tasks_are_deterministic_balanced_and_never_trained():
    assert held_out_tasks() == TASKS
    assert len({(task.instruction, task.edit) for task in TASKS}) == len(TASKS) == 200
    for half in (TASKS[:100], TASKS[100:]):
        assert Counter(task.edit.attribute for task in half) == dict.fromkeys(scenes.ATTRIBUTES, 20)
    assert all(scenes.is_held_out(task.edit.before) and scenes.is_held_out(task.edit.after) for task in TASKS)
    assert {task.edit for task in TASKS} <= set(held_out_edits())
    assert not any(scenes.is_held_out(edit.before) or scenes.is_held_out(edit.after) for edit in training_edits())
    chinese = [any("\u4e00" <= character <= "\u9fff" for character in task.instruction) for task in TASKS]
    assert chinese == [True] * 100 + [False] * 100


def test_too_many_tasks_are_refused():
    with pytest.raises(ValueError, match="not so many"):
        held_out_tasks(1000, 0)


def test_every_transition_is_trained():
    trained = {(edit.attribute, getattr(edit.before, edit.attribute), edit.value) for edit in training_edits()}
    wanted = {(name, a, b) for name, values in VALUES.items() for a in values for b in values if a != b}
    assert trained == wanted


def test_an_edit_changes_one_attribute_and_the_shape_stays_visible():
    for edit in edits_of(SCENE):
        changed = [name for name in scenes.ATTRIBUTES if getattr(edit.after, name) != getattr(SCENE, name)]
        assert changed == [edit.attribute]
        assert edit.after.colour != edit.after.background
    assert len(edits_of(SCENE)) == 6 + 6 + 5 + 1 + 4


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_no_wording_asks_for_two_different_edits_of_one_picture(language):
    asked: dict[str, Edit] = {}
    for edit in edits_of(SCENE):
        for text in instructions(edit, language):
            assert asked.setdefault(text, edit) == edit, text
            assert "{" not in text
