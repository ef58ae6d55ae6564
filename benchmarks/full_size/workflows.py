"""Whole workflows at full size, ours and others', each as a function that gives the seconds of its parts."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .worker import timed

Workflow = Callable[[str, int], dict[str, float]]


def ours(recipe: Mapping[str, Any]) -> Workflow:
    """The nodes' own path: LongCatLoader, LongCatTextEncode, LongCatSampler, LongCatDecode."""
    from longcat_pack.longcat_backend import checkpoints
    from longcat_pack.longcat_backend.comfy_bridge import clip as clip_bridge
    from longcat_pack.longcat_backend.comfy_bridge import guidance, loading, sampling
    from longcat_pack.longcat_backend.comfy_bridge import vae as vae_bridge
    from longcat_pack.longcat_backend.memory import GroupOffload

    checkpoint = checkpoints.open_checkpoint(Path(recipe["folder"]))
    encoder = loading.load_encoder(checkpoint, recipe["encoder"])
    offload = GroupOffload(**recipe["offload"]) if "offload" in recipe else None
    model = guidance.patch(
        loading.load_model(checkpoint, recipe["engine"], recipe["precision"], recipe.get("table", True), offload)
    )
    forwards = counted(model)
    decoder = vae_bridge.load(checkpoint)

    def run(prompt: str, seed: int) -> dict[str, float]:
        encoding, (positive, negative) = timed(
            lambda: (clip_bridge.encode(encoder, prompt)[0], clip_bridge.encode(encoder, "")[0])
        )
        canvas = {"samples": torch.zeros(1, 16, recipe["size"] // 8, recipe["size"] // 8)}
        sigmas = sampling.schedule(model, canvas, recipe["steps"])
        sample, latent = timed(
            lambda: sampling.sample(model, positive, negative, canvas, sigmas, recipe["guidance"], seed)
        )
        decode, _ = timed(lambda: vae_bridge.decode(decoder, latent["samples"], tiled=False))
        return {"encode": encoding, "sample": sample, "decode": decode, **forwards()}

    return run


def counted(model: Any) -> Callable[[], dict[str, float]]:
    """Count the calls of a MODEL's network; the result gives those since the last time."""
    calls: list[int] = []
    model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))

    def since() -> dict[str, float]:
        number = len(calls)
        calls.clear()
        return {"forwards": number}

    return since


def core(recipe: Mapping[str, Any]) -> Workflow:
    """ComfyUI's own loaders and sampler, with the same weights in its own layout and a batch of one picture."""
    import comfy.sd
    import comfy.utils

    from longcat_pack.longcat_backend import checkpoints, text_encoder, transformer
    from longcat_pack.longcat_backend.comfy_bridge import core_engine, sampling
    from longcat_pack.longcat_backend.comfy_bridge import vae as vae_bridge

    checkpoint = checkpoints.open_checkpoint(Path(recipe["folder"]))
    model = comfy.sd.load_diffusion_model_state_dict(dict(core_engine.convert(transformer.audited_weights(checkpoint))))
    stored = checkpoint.weights("text_encoder")
    weights = {f"model.{name}": stored[key] for name, key in text_encoder.language_keys(stored).items()}
    encoder = comfy.sd.load_text_encoder_state_dicts([weights], clip_type=comfy.sd.CLIPType.LONGCAT_IMAGE)
    decoder = vae_bridge.load(checkpoint)

    forwards = counted(model)

    def encode(prompt: str) -> Any:
        return encoder.encode_from_tokens_scheduled(encoder.tokenize(prompt))

    def run(prompt: str, seed: int) -> dict[str, float]:
        encoding, (positive, negative) = timed(lambda: (encode(prompt), encode("")))
        canvas = {"samples": torch.zeros(1, 16, recipe["size"] // 8, recipe["size"] // 8)}
        sigmas = sampling.schedule(model, canvas, recipe["steps"])
        sample, latent = timed(
            lambda: sampling.sample(model, positive, negative, canvas, sigmas, recipe["guidance"], seed)
        )
        decode, _ = timed(lambda: decoder.decode(latent["samples"]))
        return {"encode": encoding, "sample": sample, "decode": decode, **forwards()}

    return run


def pipeline(recipe: Mapping[str, Any]) -> Workflow:
    """diffusers' own pipeline with enable_model_cpu_offload, prompt rewriting off."""
    from diffusers import LongCatImagePipeline

    pipe = LongCatImagePipeline.from_pretrained(recipe["folder"], torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    pipe.set_progress_bar_config(disable=True)

    def run(prompt: str, seed: int) -> dict[str, float]:
        marks: list[float] = []
        step = pipe.scheduler.step

        def marked(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            return step(*args, **kwargs)

        pipe.scheduler.step = marked
        start = time.perf_counter()
        total, _ = timed(lambda: _draw(pipe, prompt, seed, recipe))
        pipe.scheduler.step = step
        steps = recipe["steps"]
        one = (marks[-1] - marks[0]) / (steps - 1)
        return {
            "encode": marks[0] - start - one,  # with moving the encoder out and the transformer in
            "sample": one * steps,
            "decode": start + total - marks[-1],
        }

    return run


def _draw(pipe: Any, prompt: str, seed: int, recipe: Mapping[str, Any]) -> Any:
    return pipe(
        prompt,
        negative_prompt="",
        height=recipe["size"],
        width=recipe["size"],
        num_inference_steps=recipe["steps"],
        guidance_scale=recipe["guidance"],
        generator=torch.Generator().manual_seed(seed),
        enable_prompt_rewrite=False,
    )


KINDS: dict[str, Callable[[Mapping[str, Any]], Workflow]] = {"ours": ours, "core": core, "pipeline": pipeline}
