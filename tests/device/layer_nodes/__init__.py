"""A test node for a real server: what each linear layer of a MODEL makes of one and the same input."""

from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from safetensors.torch import save_file

TOKENS = 64


class LayerOutputs:
    """Writes `<layer>` (1, tokens, out) of every linear layer and `input.<width>` (1, tokens, width), in fp32."""

    RETURN_TYPES = ()
    FUNCTION = "execute"
    CATEGORY = "test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A MODEL, and the file's name."""
        return {"required": {"model": ("MODEL",), "name": ("STRING", {"default": "layers"})}}

    def execute(self, model: Any, name: str) -> dict[str, Any]:
        """Run the layers one by one, where and in what dtype the MODEL runs."""
        comfy.model_management.load_models_gpu([model])
        device, dtype = comfy.model_management.get_torch_device(), model.model.get_dtype_inference()
        tensors: dict[str, torch.Tensor] = {}
        for layer_name, layer in model.model.diffusion_model.named_modules():
            if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
                values = tensors.setdefault(f"input.{layer.in_features}", inputs(layer.in_features))
                tensors[layer_name] = layer(values.to(device, dtype)).float().cpu()
        file = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file(tensors, file)
        return {"ui": {"file": [file.name]}}


def inputs(width: int) -> torch.Tensor:
    """Random numbers that every dtype of a computation holds."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(1, TOKENS, width, generator=generator).to(torch.bfloat16).float()


NODE_CLASS_MAPPINGS = {"LayerOutputs": LayerOutputs}
