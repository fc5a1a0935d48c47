"""The ComfyUI nodes: schemas, and a few lines of code each. What they compute is in serving, adapters and kvae."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders
from .coding import KVAEDecode, KVAEEncode
from .compare import KVAECompare
from .convert import KVAEConvertLatent, KVAELoadAdapter
from .latents import KVAEInspectLatent, KVAELoadLatent, KVAESaveLatent
from .load import KVAELoad
from .sample_clip import KVAESampleClip
from .video import KVAEDecodeToVideo

NODES: list[type[io.ComfyNode]] = [
    KVAELoad,
    KVAEDecode,
    KVAEDecodeToVideo,
    KVAEEncode,
    KVAELoadAdapter,
    KVAEConvertLatent,
    KVAEInspectLatent,
    KVAELoadLatent,
    KVAESaveLatent,
    KVAECompare,
    KVAESampleClip,
]


class KVAEExtension(ComfyExtension):
    """The nodes of this pack; `comfy_entrypoint` returns it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register()  # before a schema lists the files; not every version calls `on_load`
        return NODES
