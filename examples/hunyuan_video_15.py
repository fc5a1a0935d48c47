"""HunyuanVideo 1.5 in diffusers with KVAE as its VAE: text to video and, with --image, image to video.

    python -m examples.hunyuan_video_15 --prompt "A cat walks on the grass, realistic" --output cat.mp4 \\
        --kvae KVAE-3D-2.0-t4s16 --adapter-h2k hunyuan15_to_kvae.safetensors

Nobody has published adapters for it: train them first. KVAE encodes the image, so --image needs --adapter-k2h, too.
The image then decides the size, and the pipeline takes no --height and --width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline

from kvae_comfyui.examples.common import DiffusersOptions, inputs, load_vae, parse, write
from kvae_comfyui.training.options import KVAE_HELP, option

FROM_TEXT = HunyuanVideo15Pipeline, "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"
FROM_IMAGE = HunyuanVideo15ImageToVideoPipeline, "hunyuanvideo-community/HunyuanVideo-1.5-480p_i2v"


@dataclass(kw_only=True)
class Options(DiffusersOptions):
    kvae: str = option("tiny-t4s16", KVAE_HELP, metavar="VAE")


def main(argv: list[str] | None = None) -> None:
    options = parse(Options, __doc__, argv)
    vae = load_vae(options, "hunyuan_video_1.5", encodes=bool(options.image))
    pipeline, usual = FROM_IMAGE if options.image else FROM_TEXT
    pipe = pipeline.from_pretrained(options.model or usual, torch_dtype=torch.bfloat16)  # fails with vae=None
    pipe.vae = vae
    pipe.enable_model_cpu_offload(device=options.device)
    write(options, pipe(**inputs(options)).frames[0])


if __name__ == "__main__":
    main()
