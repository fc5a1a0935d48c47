"""What the schemas of this pack share: categories beside ComfyUI's own nodes, and what only newer versions know."""

from __future__ import annotations

from comfy_api.latest import io

from nodes import VAEDecode, VAELoader  # ComfyUI's own

LOADERS, LATENT = f"{VAELoader.CATEGORY}/KVAE", f"{VAEDecode.CATEGORY}/KVAE"
# Since ComfyUI has "model/loaders", its video nodes are in "video"
VIDEO = ("video" if VAELoader.CATEGORY.startswith("model/") else "image/video") + "/KVAE"


def schema(**fields) -> io.Schema:
    """A schema without the fields that the installed ComfyUI does not know, such as search_aliases."""
    return io.Schema(**{name: value for name, value in fields.items() if name in io.Schema.__dataclass_fields__})


def advanced(kind: type[io.Input], *args, **fields) -> io.Input:
    """An input of that kind, which newer pages show under "Show advanced"; older ones show it as any other."""
    setting = kind(*args, **fields)
    setting.advanced = True
    return setting
