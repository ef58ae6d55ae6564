"""Test nodes for a real server: an out-of-memory error inside a forward pass, and what the process still holds."""

import gc
from typing import Any

import comfy.model_management
import psutil
import torch
from torch import nn

# Late in a forward pass, by the names that the engines, the text encoder and the VAE give to their layers.
LATE_LAYERS = (".linear2", ".proj_out", ".down_proj", "decoder.conv_out")
BALLAST_BYTES = 256 * 2**20


def late_layer(model: nn.Module) -> nn.Module:
    """The last layer of the model that bears one of those names."""
    found = [layer for name, layer in model.named_modules() if name.endswith(LATE_LAYERS)]
    return found[-1]


def fail(model: nn.Module, call: int, times: int) -> None:
    """Let ``times`` calls of a late layer, from number ``call`` on, run out of memory; after that nothing is left.

    The error leaves while the pass holds a large tensor, as a real one does.
    """
    if times == 0:
        return
    calls = 0

    def before(layer: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call + times - 1:
            hook.remove()
        if calls >= call:
            ballast = torch.ones(BALLAST_BYTES, dtype=torch.uint8)
            raise torch.OutOfMemoryError(f"out of memory, for a test, beside {ballast.numel()} bytes")

    hook = late_layer(model).register_forward_pre_hook(before)


class FaultNode:
    """Hands its input on; from ``call`` on its model fails ``times`` times. ``run`` only sets a new cache key."""

    RETURN_TYPES: tuple[str, ...] = ("MODEL",)
    FUNCTION = "execute"
    CATEGORY = "test"
    PART = "diffusion_model"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """One socket and three numbers."""
        number = ("INT", {"default": 0, "min": 0})
        return {"required": {"part": (cls.RETURN_TYPES[0],), "call": number, "times": number, "run": number}}

    def execute(self, part: Any, call: int, times: int, run: int) -> tuple[Any]:
        """Arm the fault."""
        owner = part.model if self.PART == "diffusion_model" else part
        fail(getattr(owner, self.PART), call, times)
        return (part,)


class FaultModel(FaultNode):
    """A MODEL that fails."""


class FaultClip(FaultNode):
    """A CLIP that fails."""

    RETURN_TYPES = ("CLIP",)
    PART = "cond_stage_model"


class FaultVae(FaultNode):
    """A VAE that fails."""

    RETURN_TYPES = ("VAE",)
    PART = "first_stage_model"


class HeldMemory:
    """What the process holds: models on their device, bytes of all living tensors by device, and resident memory."""

    RETURN_TYPES = ()
    FUNCTION = "execute"
    CATEGORY = "test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A number that makes every question a new one."""
        return {"required": {"run": ("INT", {"default": 0, "min": 0})}}

    def execute(self, run: int) -> dict[str, Any]:
        """Count."""
        gc.collect()
        held = {
            "models": len(comfy.model_management.current_loaded_models),
            "tensors": tensor_bytes(),
            "resident": psutil.Process().memory_info().rss,
        }
        return {"ui": {"held": [held]}}


def tensor_bytes() -> int:
    """Bytes of the storages of all living tensors; quantised ones count by the plain tensors inside them."""
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (FaultModel, FaultClip, FaultVae, HeldMemory)}
