"""README.md beside the adapters: the model card of a hub repository, from the measured report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...kvae.foreign import parse_object
from ...kvae.paths import read_text, write_text
from ..evaluate.report import model_card
from ..vaes import tiny_file

README = "README.md"


def write_card(folder: Path, named: dict[str, Any]) -> None:
    """Write README.md from report.json.

    Args:
        named: both VAEs as people may read them, "hunyuan_vae" and "kvae".
    """
    report = parse_object(read_text(folder / "report.json"))
    h2k, k2h = report["adapters"]["h2k"], report["adapters"]["k2h"]
    write_text(folder / README, f"{model_card(report)}\n{_use(h2k, k2h, named)}")


def is_of(folder: Path, adapters: list[str]) -> bool:
    """Whether README.md is there, and is that of the adapters with these sha256."""
    path = folder / README
    return path.is_file() and all(each in read_text(path) for each in adapters)


def _use(h2k: dict[str, Any], k2h: dict[str, Any], named: dict[str, Any]) -> str:
    source, target, hunyuan, kvae = h2k["source"], h2k["target"], named["hunyuan_vae"], named["kvae"]
    tiny = tiny_file(kvae, "kvae")
    weights = f"training/tiny/assets/{tiny.name}" if tiny else kvae
    return f"""## Use

- `{h2k["file"]}`: KVAE decodes what models of {source} generate.
- `{k2h["file"]}`: KVAE encodes for these models: image to video, video to video.

They fit two VAEs and no other weights (the hashes are above): {source} of `{hunyuan}`, and {target} of `{kvae}`.

**ComfyUI.** Install the nodes of KVAE for ComfyUI. Put both files into `ComfyUI/models/latent_adapters`, and the KVAE
into `ComfyUI/models/vae`. Use *Load KVAE* in the place of *Load VAE*, and choose both files there.

**Python.** In a checkout of KVAE for ComfyUI, with both files in the current folder:

```python
from kvae_comfyui.adapters import HybridVAE, load_adapter
from kvae_comfyui.kvae import load_kvae

kvae = load_kvae("{weights}")
h2k, k2h = load_adapter("{h2k["file"]}"), load_adapter("{k2h["file"]}")
vae = HybridVAE(kvae, decode_adapter=h2k, encode_adapter=k2h)
video = vae.decode(z)  # z: raw latents of {source}: a DiT's divided by the scaling factor; video: in −1..1
z = vae.encode(video)
```

## Licence

The two files hold weights that were learnt from the latents of two VAEs and from the videos, and nothing of the VAEs
themselves. Whoever publishes them chooses their licence (`license:` at the top), within the terms of both VAEs and of
the videos: see the pages of `{hunyuan}` and `{kvae}`.
"""
