"""SkyReels V1 in diffusers with KVAE as its VAE: image to video.

    python -m examples.skyreels --image astronaut.jpg --prompt "An astronaut walks on the moon" --output moon.mp4 \\
        --negative-prompt "low quality, deformation, distortion" \\
        --kvae KVAE-3D-1.0 --adapter-h2k adapter_hunyuan_to_kvae3d.safetensors \\
        --adapter-k2h adapter_kvae3d_to_hunyuan.safetensors

Everything but the transformer is HunyuanVideo's. Without --negative-prompt, the pipeline uses no guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import HunyuanSkyreelsImageToVideoPipeline, HunyuanVideoTransformer3DModel

from kvae_comfyui.examples.common import DiffusersOptions, inputs, load_vae, parse, write
from kvae_comfyui.training.options import option


@dataclass(kw_only=True)
class SkyReelsOptions(DiffusersOptions):
    image: str = option(..., "the picture that the video begins with")
    transformer: str = option("Skywork/SkyReels-V1-Hunyuan-I2V", "the transformer: a folder or a hub id")


def main(argv: list[str] | None = None) -> None:
    options = parse(SkyReelsOptions, __doc__, argv)
    vae = load_vae(options, "hunyuan_video", encodes=True)
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(options.transformer, torch_dtype=torch.bfloat16)
    pipe = HunyuanSkyreelsImageToVideoPipeline.from_pretrained(
        options.model or "hunyuanvideo-community/HunyuanVideo",
        transformer=transformer,
        vae=None,  # spares loading the other VAE
        torch_dtype=torch.bfloat16,
    )
    pipe.vae = vae
    pipe.enable_model_cpu_offload(device=options.device)
    write(options, pipe(**inputs(options)).frames[0])


if __name__ == "__main__":
    main()
