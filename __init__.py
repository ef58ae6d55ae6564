"""LongCat-Image for ComfyUI. Heavy modules are imported when ComfyUI asks for the nodes, not before."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The extension that ComfyUI loads (V3 API)."""
    from .nodes import create_extension

    return create_extension()
