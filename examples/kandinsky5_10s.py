"""Kandinsky 5 Pro T2V SFT 10s in Kandinsky's own code with KVAE as its VAE: 241 frames from a text.

    python -m examples.kandinsky5_10s --code kandinsky-5 --prompt "The bear plays balalaika." --output bear.mp4 \\
        --kvae KVAE-3D-1.0 --adapter-h2k adapter_hunyuan_to_kvae3d.safetensors

--code is a checkout of github.com/kandinskylab/kandinsky-5. This needs a GPU of CUDA, that checkout's requirements, and
the weights: there, `python download_models.py --models kandinskylab/Kandinsky-5.0-T2V-Pro-sft-10s` gets them. Sizes are
512x512, 512x768 and 768x512; with --config configs/k5_pro_t2v_10s_sft_hd.yaml they are 1024x1024, 640x1408, 768x1280,
896x1152 and the same upright.
"""

from __future__ import annotations

import sys
from contextlib import chdir
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kvae_comfyui.examples.common import Options, load_vae, parse, write
from kvae_comfyui.training.options import option


@dataclass(kw_only=True)
class KandinskyOptions(Options):
    code: str = option(..., "checkout of Kandinsky's code", metavar="DIR")
    config: str = option("configs/k5_pro_t2v_10s_sft_sd.yaml", "the model: a config in the checkout")
    seconds: int = option(10, "length of the video", least=1)


def main(argv: list[str] | None = None) -> None:
    options = parse(KandinskyOptions, __doc__, argv)
    vae = load_vae(options, "hunyuan_video").to("cpu")
    sys.path.insert(0, str(Path(options.code).absolute()))
    utils: Any = import_module("kandinsky.utils")
    utils.build_vae = lambda config: vae  # or `pipe.vae = vae` below, after the other VAE was loaded
    given = {
        "negative_caption": options.negative_prompt,
        "height": options.height,
        "width": options.width,
        "num_steps": options.steps,
    }
    given = {name: value for name, value in given.items() if value}
    with chdir(options.code):  # paths in its configs are relative to it
        pipe = utils.get_T2V_pipeline(options.device, conf_path=options.config, offload=True)
        (frames,) = pipe(options.prompt, time_length=options.seconds, seed=options.seed, **given)
    write(options, frames.movedim(1, 0))


if __name__ == "__main__":
    main()
