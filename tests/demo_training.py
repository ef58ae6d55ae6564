"""Write what tools/tiny, which trains the demo checkpoints, makes of given texts: `python -m tests.demo_training OUT`.

A program of its own, run in the repository root: there `tools` and `tests` are packages that import each other, while
in a test's process the root must not be importable (see conftest.py).
"""

import copy
import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.scoring.characters import with_character
from tests.scoring.edits import edits_of, held_out_tasks
from tests.scoring.scenes import (
    ATTRIBUTES,
    LANGUAGES,
    SHAPES,
    TEMPLATES,
    WORDS,
    Scene,
    held_out_character_prompts,
    is_held_out,
)
from tools.tiny.checkpoint import build_tokenizer, load_pipeline, save_pipeline
from tools.tiny.conditioning import TEXT_SLOTS, encode, tokenize
from tools.tiny.conversations import converse
from tools.tiny.edit_checkpoint import load_edit_pipeline
from tools.tiny.edit_conditioning import (
    AROUND,
    PictureEncoder,
    encode_instructions,
    picture_patches,
    tokenize_instructions,
)
from tools.tiny.edit_flow import INSTRUCTION_WIDTH, EditPhase
from tools.tiny.edit_words import every_edit, look_edits, wordings
from tools.tiny.examples import PROMPT_WIDTH
from tools.tiny.flow import Phase
from tools.tiny.rewriting import RewritingSettings, RewritingTrainer, Stage, deepen
from tools.tiny.writing import write

DEMO = Path(__file__).resolve().parent.parent / "demo" / "LongCat-Tiny"
QUOTED_WORDS = ['a small blue square, and it says "square"', "红色圆形，写着“红色”"]
PROMPTS = [*QUOTED_WORDS, *(prompt for prompt, _ in held_out_character_prompts()[::45])]
TASKS = held_out_tasks()[::67]
DRAWS = 100  # of one of 4 clauses and one of 4 pairs of quotes
REQUESTS = {"en": "a small red star", "zh": "左边的蓝色圆形"}
PHASES = ("7:64:256", "30000:512:128:decay", "9:64:8:decay:90s", "9:64:8:1.5s")
EDIT_PHASES = ("160.5:64:192", "190:512:96:decay")
MISSPELT = ("7:64:256:decays", "7:64:256:dekay", "7:64:256:90s:decay", "7:64", "7:64:256:")
STAGES = ("600:0:1e-3:20:2e-3", "0.5:0.8:1:200:1e-3:decay")
LESSON = RewritingSettings((Stage(1.0, 0.5, 1.0, 50.0, 1e-3, False),), batch=4, conversations=20, score_every=50)


def longest_captions(tokenizer: Any) -> Iterator[str]:
    """Every template with the words that take the most tokens, with a character in every clause and quotes."""
    rng = random.Random(0)

    def tokens(word: str) -> int:
        return len(tokenizer(f"a {word}".replace("a orange", "an orange"))["input_ids"])

    for language in LANGUAGES:
        words = {name: max(itertools.chain(*WORDS[language][name].values()), key=tokens) for name in ATTRIBUTES}
        for template, character in itertools.product(TEMPLATES[language], "AW0九"):
            text = template.format(**words).replace("a orange", "an orange")
            yield from (with_character(text, character, language, rng) for _ in range(DRAWS))


def all_instructions() -> list[str]:
    """Every wording of every edit, those with invented names included.

    What one scene has already is what the other is changed to.
    """
    ends = (("red", "blue", "small", "left"), ("green", "white", "large", "top"))
    scenes = [Scene(ground, colour, shape, *rest) for shape in SHAPES for ground, colour, *rest in ends]
    looks = {(edit.before.shape, edit.value): edit for edit in look_edits()}.values()
    edits = [*(edit for scene in scenes for edit in edits_of(scene)), *looks]
    return list(dict.fromkeys(text for edit in edits for lang in LANGUAGES for text in wordings(edit, lang)))


def refusal(kind: type[Phase] | type[EditPhase], text: str) -> str:
    """What is said of a text that is no phase; empty if it is taken for one."""
    try:
        kind.parse(text)
    except ValueError as error:
        return str(error)
    return ""


def lesson(pipeline: Any) -> dict[str, Any]:
    """How far a second of learning to rewrite changes the head and the embeddings, and added layers before it."""
    reference = copy.deepcopy(pipeline.text_encoder)
    layers = pipeline.text_encoder.config.text_config.num_hidden_layers
    deepen(pipeline.text_encoder, 1)
    trainer = RewritingTrainer(pipeline, reference, LESSON)
    added = float(trainer.held_error())
    lines: list[str] = []
    trainer.train(lines.append, 1, lambda: lines.append("done"))
    moved = (pipeline.text_encoder.lm_head.weight - reference.lm_head.weight).abs().max()
    return {
        "layers": [layers, pipeline.text_encoder.model.language_model.config.num_hidden_layers],
        "error of added layers": added,
        "error after": float(trainer.held_error()),
        "head moved": float(moved),
        "steps": trainer.step,
        "lines": lines,
    }


@torch.no_grad()
def main(out: Path) -> None:
    """Write facts.json, embeddings.safetensors and the folder `saved`."""
    pipeline, editor, built = load_pipeline(DEMO), load_edit_pipeline(DEMO), build_tokenizer()
    captions = tokenize(pipeline, list(longest_captions(pipeline.tokenizer)))
    asked = tokenize_instructions(editor, all_instructions())
    conversations = {language: converse(pipeline, language, [text], [""]) for language, text in REQUESTS.items()}
    facts = {
        "prompt width": [int((captions.lengths - captions.prefix).max()), PROMPT_WIDTH],
        "instruction width": [int((asked.lengths - asked.prefix).max()) - AROUND, INSTRUCTION_WIDTH],
        "taught": [text for text in all_instructions() if "zorb" in text or set("佐布") & set(text)],
        "looks": [
            len(look_edits()),
            sum(is_held_out(end) for edit in every_edit() for end in (edit.before, edit.after)),
        ],
        "vocabulary": built.get_vocab(),
        "merges": json.loads(built.backend_tokenizer.to_str())["model"]["merges"],
        "ids": {text: built(text, add_special_tokens=False)["input_ids"] for text in (*PROMPTS, *all_instructions())},
        "phases": {text: asdict(Phase.parse(text)) for text in PHASES},
        "edit phases": {text: asdict(EditPhase.parse(text)) for text in EDIT_PHASES},
        "misspelt": {text: [refusal(kind, text) for kind in (Phase, EditPhase)] for text in MISSPELT},
        "questions": {
            language: [*c.instruction.tolist(), *c.ids[0, : c.starts[0]].tolist()]
            for language, c in conversations.items()
        },
        "stages": {text: asdict(Stage.parse(text)) for text in STAGES},
        "answers": {language: write(pipeline, [text], language)[0] for language, text in REQUESTS.items()},
    }
    with torch.enable_grad():
        facts["lesson"] = lesson(load_pipeline(DEMO))
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    rows = tokenize(pipeline, [*PROMPTS, ""], PROMPT_WIDTH)
    seen = PictureEncoder(editor)(picture_patches(editor.image_processor_vl, [task.picture() for task in TASKS]))
    told = tokenize_instructions(editor, [task.instruction for task in TASKS], INSTRUCTION_WIDTH)
    embeddings = {
        "prompts": encode(pipeline.text_encoder, rows, TEXT_SLOTS),
        "instructions": encode_instructions(editor.text_encoder, told, seen, TEXT_SLOTS),
    }
    save_file({name: value.contiguous() for name, value in embeddings.items()}, out / "embeddings.safetensors")
    save_pipeline(pipeline, out / "saved")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
