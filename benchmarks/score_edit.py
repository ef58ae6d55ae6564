"""Score the edit demo checkpoints on 200 held-out instructions through both engines: python run.py bench score_edit.

Writes benchmarks/results/score_edit.json: rates per checkpoint, engine, language and attribute asked for, and how
often the DiT ran for a picture, with date, device and versions.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _tiny import ROOT, SIZE, circumstances, load_pack

RESULT = ROOT / "benchmarks" / "results" / "score_edit.json"
# Steps and guidance of a checkpoint.
CHECKPOINTS = {"LongCat-Tiny-Edit": (20, 4.5), "LongCat-Tiny-Edit-Turbo": (8, 1.0)}
ENGINES = ("core", "diffusers")


def edit(parts: tuple[Any, Any, Any], task: Any, seed: int, steps: int, guidance: float) -> torch.Tensor:
    """The picture (128, 128, 3) that a task's instruction makes of its picture."""
    from longcat_pack.longcat_backend.comfy_bridge import editing, sampling, vae
    from longcat_pack.longcat_backend.comfy_bridge import guidance as guiding

    model, clip, decoder = parts
    patched = guiding.patch(model, renorm=False)
    image = torch.from_numpy(task.picture())[None].float() / 255
    positive, negative, canvas, _ = editing.encode(clip, decoder, image, task.instruction, "", (SIZE, SIZE))
    sigmas = sampling.schedule(patched, canvas, steps)
    drawn = sampling.sample(patched, positive, negative, canvas, sigmas, guidance, seed)
    return vae.decode(decoder, drawn["samples"], tiled=False)[0]


@torch.inference_mode()
def score(
    folder: Path, engine: str, tasks: Sequence[Any], steps: int, guidance: float
) -> tuple[list[dict[str, bool]], float]:
    """One score a task, in order, and the mean number of the DiT's forwards for one picture."""
    from longcat_pack.longcat_backend.comfy_bridge import files, loading, vae
    from scoring.edits import score_edit

    checkpoint = files.Place(folder=folder).open()
    model = loading.load_model(checkpoint, engine, "fp32")
    parts = (model, loading.load_encoder(checkpoint, "fp32"), vae.load(checkpoint))
    forwards: list[None] = []
    hook = model.model.diffusion_model.register_forward_hook(lambda *_: forwards.append(None))
    pictures = [edit(parts, task, seed, steps, guidance) for seed, task in enumerate(tasks)]
    hook.remove()
    scores = [score_edit(picture.numpy(), task.edit) for picture, task in zip(pictures, tasks, strict=True)]
    return scores, len(forwards) / len(tasks)


def rates(tasks: Sequence[Any], scores: Sequence[dict[str, bool]]) -> dict[str, dict[str, float]]:
    """Rates of each language, of both, and of both for each attribute that was asked for."""
    from scoring.edits import summarise_edits

    groups: dict[str, list[dict[str, bool]]] = {}
    for task, score in zip(tasks, scores, strict=True):
        language = "en" if task.instruction.isascii() else "zh"
        for name in (language, "both", task.edit.attribute):
            groups.setdefault(name, []).append(score)
    return {name: summarise_edits(group) for name, group in groups.items()}


def main() -> None:
    """Score, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="instructions of each language")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder of the checkpoints")
    parser.add_argument("--only", nargs="+", default=list(CHECKPOINTS), choices=CHECKPOINTS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_pack(arguments.device)
    from longcat_pack.longcat_backend.comfy_bridge import host
    from scoring.edits import held_out_tasks

    host.register_model_folder()
    tasks = held_out_tasks(arguments.count, arguments.count)
    table: dict[str, Any] = {}
    for name in arguments.only:
        steps, guidance = CHECKPOINTS[name]
        table[name] = {"steps": steps, "guidance": guidance}
        for engine in ENGINES:
            scores, forwards = score(arguments.demo / name, engine, tasks, steps, guidance)
            table[name][engine] = {"forwards": forwards, **rates(tasks, scores)}
    result = {
        **circumstances(arguments.device),
        "settings": {"instructions": len(tasks), "precision": "fp32"},
        "rates": table,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
