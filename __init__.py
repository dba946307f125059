"""ComfyUI-SVDQuant: 4-bit FLUX, SDXL and PixArt in ComfyUI. Registers the nodes with the host."""

import logging

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = "./web"

try:
    from server import PromptServer

    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .svdq_core.host.routes import add_routes

    add_routes(PromptServer.instance.routes)
except Exception as error:  # a broken installation must not take the host down with it
    logging.exception("ComfyUI-SVDQuant could not be loaded, its nodes are missing: %s", error)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
