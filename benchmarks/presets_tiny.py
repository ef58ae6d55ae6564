"""LongCat-Tiny under every precision: pictures that are right, and how far a forward is from fp32.

    python run.py bench presets_tiny [--device cuda] [--prompts 200]

Every preset of both engines with the encoder in fp32, and every preset of the encoder with the core engine in fp32,
through the functions of LongCatLoader, LongCatTextEncode and LongCatSampler. A preset whose kernels the device lacks
is listed with the reason; on a CPU, fp8 of the core engine is unpacked for each product, as ComfyUI does there.
The gates: 8-bit within 1 point of bf16, 4-bit within 5. Writes benchmarks/results/presets_tiny.json; the exit code
is 1 when a gate does not hold.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _tiny
import torch

RESULT = _tiny.ROOT / "benchmarks" / "results" / "presets_tiny.json"
STEPS = 20
GUIDANCE = 4.0
SEED = 0
ERROR_PROMPTS = 4
ERROR_STEPS = 4
GATES = {8: 1.0, 4: 5.0}  # points below bf16, by the bits of a weight

Parts = tuple[Any, Any, Any]
Pairs = Sequence[tuple[str, Any]]


def rows() -> list[tuple[str, str, str]]:
    """What is measured: (engine, its precision, the encoder's)."""
    from longcat_pack.longcat_backend import precision

    engines = [(engine, name, "fp32") for engine, names in precision.ENGINE_PRESETS.items() for name in names]
    return engines + [("core", "fp32", name) for name in precision.ENCODER_PRESETS if name != "fp32"]


def conditioning(clip: Any, prompts: Sequence[str]) -> list[Any]:
    """One CONDITIONING for a batch of pictures, each with a prompt of its own."""
    from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge

    encoded = [clip_bridge.encode(clip, prompt)[0][0] for prompt in prompts]
    return [[torch.cat([embedding for embedding, _ in encoded]), encoded[0][1]]]


def draw(parts: Parts, prompts: Sequence[str]) -> torch.Tensor:
    """Pictures (prompts, 128, 128, 3)."""
    from longcat_pack.longcat_backend import latents
    from longcat_pack.longcat_backend.comfy_bridge import guidance, sampling, vae

    model, clip, decoder = parts
    patched = guidance.patch(model)
    canvas = {"samples": latents.empty_latent(_tiny.SIZE, _tiny.SIZE, len(prompts))}
    sigmas = sampling.schedule(patched, canvas, STEPS)
    conditions = conditioning(clip, prompts), conditioning(clip, [""])
    drawn = sampling.sample(patched, *conditions, canvas, sigmas, GUIDANCE, SEED)
    pictures: torch.Tensor = vae.decode(decoder, drawn["samples"], tiled=False)
    return pictures


def velocities(parts: Parts, prompts: Sequence[str], states: Sequence[_tiny.State]) -> torch.Tensor:
    """What the MODEL answers at the states to the CLIP's embeddings, asked in a sampler's place."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    model, clip, _ = parts
    found: list[torch.Tensor] = []

    def probe(denoise: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, **_: Any) -> torch.Tensor:
        for state in states:
            samples = state.samples.to(x)
            sigma = torch.full((len(samples),), state.sigma, device=x.device, dtype=torch.float32)
            found.append(((samples - denoise(samples, sigma, **extra_args)) / state.sigma).cpu())
        return x

    text = conditioning(clip, prompts)
    sigmas = torch.tensor([*(state.sigma for state in states), 0.0])
    latent = {"samples": torch.zeros_like(states[0].samples)}
    SamplerCustom.execute(model, False, SEED, 1.0, text, text, comfy.samplers.KSAMPLER(probe), sigmas, latent)
    return torch.stack(found)


def expected_velocities(states: Sequence[_tiny.State]) -> torch.Tensor:
    """The same of the diffusers class in fp32, without ComfyUI."""
    from longcat_pack.longcat_backend import checkpoints, transformer

    model = transformer.load_transformer(checkpoints.open_checkpoint(_tiny.FOLDER), torch.float32)
    with torch.no_grad():
        answers = [model(s.samples, torch.full((len(s.samples),), s.sigma), s.text) for s in states]
    return torch.stack(answers)


@torch.inference_mode()
def measure(row: tuple[str, str, str], pairs: Pairs, batch: int, states: Any, expected: torch.Tensor) -> dict[str, Any]:
    """Rates of right pictures and the forward's error, or why there are none."""
    from longcat_pack.longcat_backend.comfy_bridge import loading
    from longcat_pack.longcat_backend.errors import LongCatError
    from scoring.score import score_image, summarise

    try:
        parts = loading.load(_tiny.NAME, *row)
    except LongCatError as error:
        return {"unavailable": error.en}
    scores = []
    for start in range(0, len(pairs), batch):
        chosen = pairs[start : start + batch]
        pictures = draw(parts, [prompt for prompt, _ in chosen]).cpu().numpy()
        scores += [score_image(picture, scene) for picture, (_, scene) in zip(pictures, chosen, strict=True)]
    prompts = [prompt for prompt, _ in pairs[:ERROR_PROMPTS]]
    error = _tiny.relative_error(velocities(parts, prompts, states), expected)
    return {"forward_error": float(f"{error:.3g}"), "rates": summarise(scores)}


def failed_gates(table: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences about the presets that draw worse than they may."""
    from longcat_pack.longcat_backend import precision

    right = {
        (row["engine"], row["precision"], row["encoder"]): 100 * row["rates"]["all"] for row in table if "rates" in row
    }
    failed = []
    for (engine, name, encoder), rate in right.items():
        reference = right.get((engine, "bf16", encoder) if encoder == "fp32" else (engine, name, "bf16"), 0.0)
        gate = GATES.get(precision.PRESETS[name if encoder == "fp32" else encoder].bits)
        if gate is not None and rate < reference - gate:
            failed.append(f"{engine} {name}, encoder {encoder}: {rate:.1f} %, bf16 {reference:.1f} %")
    return failed


def main() -> int:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts, half of them Chinese")
    parser.add_argument("--batch", type=int, default=20, help="pictures that are drawn together, up to 64")
    parser.add_argument("--only", nargs="*", help="rows to measure, such as core/bf16/fp32 (default: all)")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    _tiny.load_pack(arguments.device)
    from longcat_pack.longcat_backend.comfy_bridge import host
    from scoring.scenes import held_out_prompts

    logging.getLogger().setLevel(logging.ERROR)
    host.register_model_folder()
    pairs = held_out_prompts(arguments.prompts // 2, arguments.prompts - arguments.prompts // 2)
    states = _tiny.states([prompt for prompt, _ in pairs[:ERROR_PROMPTS]], ERROR_STEPS)
    expected = expected_velocities(states)
    table = []
    for row in [row for row in rows() if not arguments.only or "/".join(row) in arguments.only]:
        measured = measure(row, pairs, arguments.batch, states, expected)
        table.append({**dict(zip(("engine", "precision", "encoder"), row, strict=True)), **measured})
        print(json.dumps(table[-1]), flush=True)
        failed = failed_gates(table)
        settings = {"prompts": len(pairs), "steps": STEPS, "guidance": GUIDANCE, "gates_points": GATES}
        result = {**_tiny.circumstances(arguments.device), "settings": settings, "rows": table, "failed_gates": failed}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")  # a run may be cut short
    print("\n".join(failed) or "every gate holds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
