"""Score the demo checkpoint on all 200 held-out prompts through both engines: python run.py bench score_tiny.

Writes benchmarks/results/score_tiny.json: rates per engine, language and attribute, with date, device and versions.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "score_tiny.json"
STEPS = 20
GUIDANCE = 4.0
SIZE = 128
ENGINES = ("core", "diffusers")


def draw(parts: tuple[Any, Any, Any], prompt: str, seed: int) -> torch.Tensor:
    """The picture (128, 128, 3) of a prompt."""
    from longcat_pack.longcat_backend import latents
    from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
    from longcat_pack.longcat_backend.comfy_bridge import guidance, sampling, vae

    model, clip, decoder = parts
    patched = guidance.patch(model)
    positive, _ = clip_bridge.encode(clip, prompt)
    negative, _ = clip_bridge.encode(clip, "")
    canvas = {"samples": latents.empty_latent(SIZE, SIZE, 1)}
    sigmas = sampling.schedule(patched, canvas, STEPS)
    drawn = sampling.sample(patched, positive, negative, canvas, sigmas, GUIDANCE, seed)
    return vae.decode(decoder, drawn["samples"], tiled=False)[0]


@torch.inference_mode()
def score(engine: str, pairs: Sequence[tuple[str, Any]]) -> list[dict[str, bool]]:
    """One score per (prompt, scene), in order."""
    from longcat_pack.longcat_backend.comfy_bridge import loading
    from scoring.score import score_image

    parts = loading.load("LongCat-Tiny", engine, "fp32", "fp32")
    return [score_image(draw(parts, prompt, seed).numpy(), scene) for seed, (prompt, scene) in enumerate(pairs)]


def main() -> None:
    """Score, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="prompts of each language")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))  # how the tests load the pack and ComfyUI
    from longcat_pack.longcat_backend.comfy_bridge import host
    from scoring.scenes import held_out_prompts
    from scoring.score import summarise

    host.register_model_folder()
    table: dict[str, Any] = {}
    for engine in ENGINES:
        halves = {"zh": held_out_prompts(arguments.count, 0), "en": held_out_prompts(0, arguments.count)}
        scores = {language: score(engine, pairs) for language, pairs in halves.items()}
        table[engine] = {language: summarise(values) for language, values in scores.items()}
        table[engine]["both"] = summarise(scores["zh"] + scores["en"])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu ({platform.machine()})",
        "versions": versions,
        "settings": {"prompts": 2 * arguments.count, "steps": STEPS, "guidance": GUIDANCE, "precision": "fp32"},
        "rates": table,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
