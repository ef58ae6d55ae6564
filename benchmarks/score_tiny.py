"""Score the demo checkpoint on all 200 held-out prompts through both engines: python run.py bench score_tiny.

Writes benchmarks/results/score_tiny.json: rates per engine, language and attribute, with date, device and versions.
`--what` adds quoted characters, with and without their quotes, and rewritten requests with the pictures of the
rewrites.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _tiny import NAME, ROOT, SIZE, load_pack

RESULT = ROOT / "benchmarks" / "results" / "score_tiny.json"
STEPS = 20
GUIDANCE = 4.0
ENGINES = ("core", "diffusers")
LANGUAGES = ("zh", "en")
SCENES, CHARACTERS, REWRITING = WHAT = ("scenes", "characters", "rewriting")
LONGEST_REWRITE = 64  # tokens; a full caption has about 20
WRONG_SHOWN = 10

Parts = tuple[Any, Any, Any]  # MODEL, CLIP and VAE
Rates = dict[str, dict[str, float]]  # of each language and of both


@torch.inference_mode()
def draw(parts: Parts, prompt: str, seed: int) -> torch.Tensor:
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


def pictures(parts: Parts, prompts: Sequence[str]) -> list[Any]:
    """A picture (128, 128, 3) in 0..1 of each prompt, whose place in the sequence is its seed."""
    return [draw(parts, prompt, seed).numpy() for seed, prompt in enumerate(prompts)]


def by_language(rates: Callable[[Sequence[Any]], dict[str, float]], scores: dict[str, list[Any]]) -> Rates:
    """The rates of each language's scores, and of all."""
    every = [score for language in LANGUAGES for score in scores[language]]
    return {language: rates(found) for language, found in {**scores, "both": every}.items()}


def score_scenes(parts: Parts, count: int) -> Rates:
    """How often the pictures of held-out prompts, `count` in each language, have each attribute."""
    from scoring.scenes import held_out_prompts
    from scoring.score import score_image, summarise

    scores = {}
    for language, pairs in {"zh": held_out_prompts(count, 0), "en": held_out_prompts(0, count)}.items():
        drawn = pictures(parts, [prompt for prompt, _ in pairs])
        scores[language] = [score_image(picture, scene) for picture, (_, scene) in zip(drawn, pairs, strict=True)]
    return by_language(summarise, scores)


def score_characters(parts: Parts, count: int) -> Rates:
    """How often the character of a held-out prompt is on the shape, and how often without the quotes around it."""
    from scoring.characters import without_quotes
    from scoring.reading import score_character
    from scoring.scenes import held_out_character_prompts

    scores = {}
    halves = {"zh": held_out_character_prompts(count, 0), "en": held_out_character_prompts(0, count)}
    for language, pairs in halves.items():
        quoted = pictures(parts, [prompt for prompt, _ in pairs])
        unquoted = pictures(parts, [without_quotes(prompt) for prompt, _ in pairs])
        scores[language] = [
            {"quoted": score_character(with_them, scene), "unquoted": score_character(without, scene)}
            for with_them, without, (_, scene) in zip(quoted, unquoted, pairs, strict=True)
        ]
    return by_language(shares, scores)


def rewrite(clip: Any, count: int) -> dict[str, list[tuple[Any, str]]]:
    """Held-out requests, `count` in each language, and what LongCatPromptRewrite makes of them by its defaults."""
    from scoring.requests import held_out_requests

    requests = {"zh": held_out_requests(count, 0), "en": held_out_requests(0, count)}
    return {language: [(asked, rewritten(clip, asked.text)) for asked in own] for language, own in requests.items()}


@torch.inference_mode()
def rewritten(clip: Any, text: str) -> str:
    """The likeliest rewrite of a request; an empty one is shown and counts like any other wrong one."""
    from longcat_pack.longcat_backend import rewriting
    from longcat_pack.longcat_backend.comfy_bridge import rewriting as bridge
    from longcat_pack.longcat_backend.errors import LongCatError

    try:
        return bridge.by_encoder(clip, text, rewriting.AUTO, rewriting.Sampling(0, 0.0, LONGEST_REWRITE))[0]
    except LongCatError as error:
        print(f"{text}: {error}")
        return ""


def score_rewrites(rewrites: dict[str, list[tuple[Any, str]]]) -> dict[str, Any]:
    """How often a rewrite is a full caption that keeps all that was stated, and the first that are not."""
    from scoring.requests import keeps

    scores = {language: [{"kept": keeps(text, asked)} for asked, text in own] for language, own in rewrites.items()}
    pairs = [pair for own in rewrites.values() for pair in own]
    wrong = [[asked.text, text] for asked, text in pairs if not keeps(text, asked)]
    return {**by_language(shares, scores), "wrong": wrong[:WRONG_SHOWN]}


def score_rewritten(parts: Parts, rewrites: dict[str, list[tuple[Any, str]]]) -> Rates:
    """How often the rewrites' pictures show all that the request stated, and how often all that the caption says.

    A rewrite that is no full caption is drawn as well; its picture shows nothing of a caption.
    """
    from scoring.requests import read_caption
    from scoring.score import detect, score_image

    scores = {}
    for language, own in rewrites.items():
        scores[language] = []
        for picture, (asked, text) in zip(pictures(parts, [text for _, text in own]), own, strict=True):
            seen, scene = detect(picture), read_caption(text, language)
            stated = all(getattr(seen, name) == value for name, value in asked.stated)
            caption = scene is not None and score_image(picture, scene)["all"]
            scores[language].append({"stated": stated, "caption": caption})
    return by_language(shares, scores)


def shares(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of each answer that is true."""
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def run(what: Sequence[str], count: int) -> dict[str, Any]:
    """The rates of each engine, and those of the rewriting, which has no engine."""
    from longcat_pack.longcat_backend.comfy_bridge import loading

    table: dict[str, Any] = {}
    written: dict[str, Any] = {}
    rewrites: dict[str, list[tuple[Any, str]]] = {}
    for engine in ENGINES:
        parts = loading.load(NAME, engine, "fp32", "fp32")
        table[engine] = score_scenes(parts, count) if SCENES in what else {}
        if CHARACTERS in what:
            table[engine][CHARACTERS] = score_characters(parts, count)
        if REWRITING in what:
            rewrites = rewrites or rewrite(parts[1], (count + 1) // 2)
            written = {REWRITING: score_rewrites(rewrites)}
            table[engine][REWRITING] = score_rewritten(parts, rewrites)
    return {"rates": table, **written}


def main() -> None:
    """Score, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=[SCENES], help="what is scored; all go in one file")
    parser.add_argument("--count", type=int, default=100, help="prompts of each language; half as many requests")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_pack(arguments.device)
    from longcat_pack.longcat_backend.comfy_bridge import host

    host.register_model_folder()
    found = run(arguments.what, arguments.count)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    on_cpu = arguments.device == "cpu"
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu ({platform.machine()})" if on_cpu else torch.cuda.get_device_name(),
        "versions": versions,
        "settings": {"prompts": 2 * arguments.count, "steps": STEPS, "guidance": GUIDANCE, "precision": "fp32"},
        **found,
    }
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found if REWRITING in found else found["rates"], indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
