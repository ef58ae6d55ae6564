"""LongCat-Image without a host: checkpoints, prompts, encoder, transformer, sampling maths.

Plain torch, diffusers and transformers. Only the sub-package ``comfy_bridge`` imports ComfyUI.
"""
