"""Options of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from ..latents.options import ReadingOptions
from ..options import DEVICE, HUNYUAN_HELP, KVAE_HELP, option


@dataclass(kw_only=True)
class EvaluateConfig(ReadingOptions):
    latent_root: str = option("", "folder of pairs to evaluate on, from extract or pack")
    latents: str = option("", "in place of pairs: folder of generated latents, of any kind that decode reads")
    videos_root: str = option("", "folder of the videos that the pairs are from; without it, pixels are not measured")
    adapter_h2k: str = option("hunyuan_to_kvae.safetensors", "Hunyuan → KVAE adapter")
    adapter_k2h: str = option("kvae_to_hunyuan.safetensors", "KVAE → Hunyuan adapter")
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP, metavar="VAE")
    kvae: str = option("tiny", KVAE_HELP, metavar="VAE")
    train_latent_root: str = option(
        "", "folder of pairs to fit the affine maps to; without it, the other half of these"
    )
    output_root: str = option("evaluation", "folder for the table, the JSON and the pictures", writes="folder")
    max_samples: int = option(2000, "largest number of pairs to measure in latents", least=1)
    num_pixel_samples: int = option(128, "largest number of pairs or generations to measure in pixels", least=1)
    device: str = option(DEVICE, "device of VAEs and adapters", metavar="DEVICE")
