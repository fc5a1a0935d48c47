"""KVAE for ComfyUI: this folder as a custom node pack.

Importing it costs nothing and needs no ComfyUI: the nodes are imported when ComfyUI asks for them.
"""

WEB_DIRECTORY = "./web"  # help pages, docs/<node id>.md, and what two nodes need in the page


async def comfy_entrypoint():
    """The extension that lists the nodes. ComfyUI calls this."""
    from .nodes import KVAEExtension

    return KVAEExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
