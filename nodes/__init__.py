"""The ComfyUI nodes: schemas and a few lines each. The arithmetic is in serving, adapters and kvae."""

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
    """The extension that `comfy_entrypoint` returns."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register()  # before any schema lists the files; not every ComfyUI calls `on_load`
        return NODES
