"""HunyuanVideo in diffusers with KVAE as its VAE: text to video and, with --image, image to video.

    python -m examples.hunyuan_video --prompt "A cat walks on the grass, realistic" --output cat.mp4 \\
        --kvae KVAE-3D-1.0 --adapter-h2k adapter_hunyuan_to_kvae3d.safetensors

KVAE encodes the image, so --image needs --adapter-k2h, too. With --model hunyuanvideo-community/HunyuanVideo-I2V-33ch,
the pipeline leaves out the first four frames.
"""

from __future__ import annotations

import torch
from diffusers import HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline

from kvae_comfyui.examples.common import DiffusersOptions, inputs, load_vae, parse, write

FROM_TEXT = HunyuanVideoPipeline, "hunyuanvideo-community/HunyuanVideo"
FROM_IMAGE = HunyuanVideoImageToVideoPipeline, "hunyuanvideo-community/HunyuanVideo-I2V"


def main(argv: list[str] | None = None) -> None:
    options = parse(DiffusersOptions, __doc__, argv)
    vae = load_vae(options, "hunyuan_video", encodes=bool(options.image))
    pipeline, usual = FROM_IMAGE if options.image else FROM_TEXT
    # vae=None spares loading the other VAE; diffusers accepts no object here that is not a model of its own
    pipe = pipeline.from_pretrained(options.model or usual, vae=None, torch_dtype=torch.bfloat16)
    pipe.vae = vae
    pipe.enable_model_cpu_offload(device=options.device)
    write(options, pipe(**inputs(options)).frames[0])


if __name__ == "__main__":
    main()
