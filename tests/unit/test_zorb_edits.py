"""The edit lesson: what is taught, what is asked for afterwards, and what is to be kept."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from scoring import scenes, score, zorb, zorb_edits

SHOWN, ASKED = zorb_edits.training_tasks(), zorb_edits.held_out_tasks()


def test_few_pairs_teach_and_others_are_asked_for() -> None:
    assert len(SHOWN) == 16 and len(ASKED) == 20
    assert not {task.scene for task in SHOWN} & {task.scene for task in ASKED}
    for tasks in (SHOWN, ASKED):
        assert {task.before.place for task in tasks} == set(scenes.PLACES)
        assert {task.before.background for task in tasks} == set(zorb.BACKGROUNDS)
        words = [zorb.NAMES[language] for language in scenes.LANGUAGES]
        counts = [sum(word in task.instruction for task in tasks) for word in words]
        assert sum(counts) == len(tasks) and min(counts) >= 0.4 * len(tasks)
    assert not any(scenes.is_held_out(task.before) for task in SHOWN)
    assert all(scenes.is_held_out(task.before) for task in ASKED)


def test_the_zorb_stands_where_the_shape_stood() -> None:
    for task in (*SHOWN, *ASKED):
        assert zorb.score_image(task.wanted(), task.scene)["all"], task
        assert not zorb.score_image(task.picture(), task.scene)["all"], task
        assert asdict(task.scene).items() <= asdict(task.before).items()


def test_instructions_to_be_kept_fit_their_pictures_and_say_nothing_of_zorbs() -> None:
    prompts = zorb_edits.preservation_prompts(40)
    assert len(prompts) == 40 and prompts == zorb_edits.preservation_prompts(40)
    assert not any(name in prompt for prompt in prompts for name in zorb.NAMES.values())
    named = 0
    for number, prompt in enumerate(prompts):
        picture = zorb_edits.preservation_pictures()[number % zorb_edits.PRESERVED]
        for shape in scenes.SHAPES:
            words = (*scenes.WORDS["en"]["shape"][shape], *scenes.WORDS["zh"]["shape"][shape])
            if any(f"the {word}" in prompt or prompt.startswith((f"把{word}", word)) for word in words):
                assert score.detect(picture).shape == shape, (number, prompt)
                named += 1
    assert named >= 10


def test_the_demo_pairs_are_what_is_drawn_here(pack_dir: Path) -> None:
    folder = pack_dir / "demo" / "datasets" / "zorb_edit"
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("references/*"))) == len(SHOWN)
    for number, task in enumerate(SHOWN):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{number:02}.png")), task.wanted())
        np.testing.assert_array_equal(
            np.asarray(Image.open(folder / "references" / f"{number:02}.png")), task.picture()
        )
        assert (folder / f"{number:02}.txt").read_text(encoding="utf-8").strip() == task.instruction
    kept = zorb_edits.preservation_pictures()
    assert len(list(folder.glob("preserved/*"))) == len(kept)
    for number, picture in enumerate(kept):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "preserved" / f"{number:02}.png")), picture)
