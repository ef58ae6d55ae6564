"""Qwen2.5-VL's vision tower: a picture to the embeddings that stand for it in an instruction."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from .checkpoints import Checkpoint, audit, build, shapes
from .errors import LongCatError

_PREFIXES = ("visual.", "model.visual.")


@dataclass(frozen=True)
class PictureTokens:
    """Embeddings (rows · columns, hidden size) of one picture, row by row."""

    features: torch.Tensor
    rows: int
    columns: int


class VisionEncoder(nn.Module):
    """The image processor and the tower behind it."""

    def __init__(self, tower: Qwen2_5_VisionTransformerPretrainedModel, processor: BaseImageProcessor) -> None:
        super().__init__()
        self.tower = tower
        self.processor = processor

    @torch.no_grad()
    def encode(self, picture: Image.Image, device: torch.device | None = None) -> PictureTokens:
        """Embeddings of a picture: one per 28×28 pixels, to which its sides are rounded."""
        inputs = self.processor(images=[picture], return_tensors="pt")
        grid = inputs["image_grid_thw"]
        features = self.tower(inputs["pixel_values"].to(device), grid_thw=grid.to(device)).pooler_output
        merge = self.tower.spatial_merge_size
        _, rows, columns = (int(side) for side in grid[0])
        return PictureTokens(features, rows // merge, columns // merge)


def load_vision(
    checkpoint: Checkpoint, dtype: torch.dtype, prepare: Callable[[nn.Module], None] = lambda tower: None
) -> VisionEncoder:
    """Build tower and processor from their own configs and load only the tower's weights, on the CPU.

    Args:
        prepare: exchanges layers of the tower while it has no weights yet.

    Raises:
        LongCatError: the checkpoint holds no tower or no processor, or they do not fit their configs.
    """
    processor = load_processor(checkpoint.processor_config())
    tower = empty_tower(checkpoint.configs["text_encoder"])
    stored_shapes = checkpoint.shapes("text_encoder")
    keys = vision_keys(stored_shapes)
    if not keys:
        raise LongCatError(
            "The text encoder's file has no vision tower (no weight starts with 'visual.'), so it cannot see the "
            "picture. Use the text encoder of LongCat-Image-Edit, or Qwen2.5-VL-7B with its vision tower.",
            "文本编码器的文件中没有视觉塔（没有以“visual.”开头的权重），无法读取图像。"
            "请使用 LongCat-Image-Edit 的文本编码器，或带视觉塔的 Qwen2.5-VL-7B。",
        )
    found = {name: stored_shapes[key] for name, key in keys.items()}
    audit("text_encoder", shapes(tower.state_dict()), found)
    prepare(tower)
    stored = checkpoint.weights("text_encoder")
    tower.load_state_dict({name: stored[key].to(dtype) for name, key in keys.items()}, assign=True)
    tower._init_weights(tower.rotary_pos_emb.to_empty(device="cpu"))  # its buffers are in no file
    return VisionEncoder(tower.eval().requires_grad_(False), processor)


def load_processor(config: Mapping[str, Any]) -> BaseImageProcessor:
    """The image processor of a config, as the official pipeline gets it: on torchvision.

    Its class has had several names; the library finds it by the official one.

    Raises:
        LongCatError: no processor can be made of the config.
    """

    def made() -> BaseImageProcessor:
        with TemporaryDirectory(prefix="longcat-processor-") as folder:
            text = json.dumps({**config, "image_processor_type": "Qwen2VLImageProcessor"})
            (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    return build("text_processor", made)


def empty_tower(config: Mapping[str, Any]) -> Qwen2_5_VisionTransformerPretrainedModel:
    """The tower without storage, from the config of the text encoder that it is part of.

    Raises:
        LongCatError: no tower can be built from the config.
    """

    def empty() -> Qwen2_5_VisionTransformerPretrainedModel:
        vision_config = Qwen2_5_VLConfig.from_dict(dict(config)).vision_config
        with torch.device("meta"):
            return Qwen2_5_VisionTransformerPretrainedModel(vision_config)

    return build("text_encoder", empty)


def vision_keys(keys: Iterable[str]) -> dict[str, str]:
    """The tower's keys in transformers' class to those given; the language model's are left out."""
    return {key.removeprefix(prefix): key for key in keys for prefix in _PREFIXES if key.startswith(prefix)}
