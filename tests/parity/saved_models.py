"""What LongCatSaveCheckpoint writes from the demo checkpoint, and what the saved models say."""

from pathlib import Path
from typing import Any

import torch

from longcat_pack.longcat_backend import checkpoints, single_files

TOKENIZER = Path("no tokenizer is needed from elsewhere")
Parts = tuple[Any, Any, Any]


def load(checkpoint: checkpoints.Checkpoint, engine: str = "core", model: str = "bf16", encoder: str = "bf16") -> Parts:
    """MODEL, CLIP and VAE in some precisions."""
    from longcat_pack.longcat_backend.comfy_bridge import loading, vae

    encoder_parts = loading.load_encoder(checkpoint, encoder)
    return loading.load_model(checkpoint, engine, model), encoder_parts, vae.load(checkpoint)


def save(parts: Parts, layout: str, precision: str = "keep", **options: Any) -> str:
    """Save them as "mine"; the report."""
    from longcat_pack.longcat_backend.comfy_bridge import saving

    return saving.save(*parts, options.get("name", "mine"), layout, precision, options.get("overwrite", False))


def files(models: Path, name: str = "longcat_mine") -> dict[str, Path]:
    """Where the single files of a checkpoint lie."""
    return {
        "transformer": models / "diffusion_models" / f"{name}.safetensors",
        "text_encoder": models / "text_encoders" / f"{name}_text_encoder.safetensors",
        "vae": models / "vae" / f"{name}_vae.safetensors",
    }


def saved(models: Path, layout: str) -> checkpoints.Checkpoint:
    """What was saved as "mine"."""
    if layout == "folder":
        return checkpoints.open_checkpoint(models / "longcat_image" / "mine")
    return single_files.open_single_files(files(models), TOKENIZER)


def velocity(model: Any) -> torch.Tensor:
    """One forward of a MODEL."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(0)
    latent, text = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 512, 64, generator=generator)
    with torch.no_grad():
        return model.model.apply_model(latent, torch.tensor([0.7]), c_crossattn=text)


def embeddings(clip: Any) -> torch.Tensor:
    """A prompt as a CLIP encodes it."""
    return clip.encode_from_tokens(clip.tokenize("a red circle, 蓝色"))
