"""The nodes: schemas and a few lines of execute. The work is done in ``longcat_backend``."""

import logging

from comfy_api.latest import ComfyExtension, io

from ..longcat_backend.comfy_bridge import host

logger = logging.getLogger(__name__)


class LongCatExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Import the node files; ComfyUI would reduce a failure to one line, so the traceback is logged here."""
        try:
            from . import (
                conditioning,
                dataset,
                editing,
                latents,
                loading,
                lora,
                prompt_grid,
                rewriting,
                sampling,
                saving,
                training,
            )
        except Exception:
            logger.exception("LongCat-Image could not be loaded / LongCat-Image 加载失败")
            raise
        drawing = (loading, conditioning, rewriting, editing, latents, sampling, saving, lora)
        modules = (*drawing, dataset, training, prompt_grid)
        return [node for module in modules for node in module.NODES]


def create_extension() -> LongCatExtension:
    """Check the host and register the model folder before any node exists.

    Raises:
        LongCatError: the host is too old.
    """
    try:
        host.require_host()
    except ValueError as error:
        logger.error("%s", error)
        raise
    host.register_model_folder()
    return LongCatExtension()
