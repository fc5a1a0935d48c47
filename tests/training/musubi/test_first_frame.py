"""What HunyuanVideo 1.5 needs of the first frame to train image to video."""

import pytest
import torch
from safetensors.torch import load_file

import needs
from encoder_files import hunyuan_options, siglip_options
from kvae_comfyui.kvae.pixels import HUNYUAN_HALF_RANGE, to_unit
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.musubi.frames import read_windows
from kvae_comfyui.training.musubi.windows import Window
from kvae_comfyui.training.vaes import load_hunyuan_vae
from musubi_media import clip, write_config

pytest.importorskip("cv2", reason="needs cv2: install requirements-training.txt")
transformers = needs.package("transformers", "transformers")
HV15 = "hunyuan_video_1.5"


@torch.inference_mode()
def test_the_first_frame_of_hunyuan_video_15(tmp_path):
    """musubi-tuner's formula: the first frame encoded alone, a mask, and SigLIP's last hidden state."""
    clip(tmp_path / "v" / "a.mp4", 9, 64, 96)
    video = {"video_directory": str(tmp_path / "v"), "cache_directory": str(tmp_path / "c"), "target_frames": [9]}
    config = write_config(tmp_path / "a.json", video, caption_extension=".txt", resolution=[96, 64])
    argv = ["cache", "--dataset-config", str(config), "--architecture", HV15, "--device", "cpu"]
    vae = hunyuan_options(tmp_path, HV15)
    assert main([*argv, *vae, *siglip_options(tmp_path)]) == 0
    (path,) = (tmp_path / "c").glob("*.safetensors")
    cache = load_file(path)
    assert cache.keys() == {"latents_3x4x6_float16", "latents_image_3x4x6_float32", "siglip_float16"}
    _, frames = next(read_windows(str(tmp_path / "v" / "a.mp4"), range(9), [Window(0, 9)], (96, 64)))
    x = to_unit(torch.from_numpy(frames[0]).permute(2, 0, 1)[None, :, None], HUNYUAN_HALF_RANGE)
    first = load_hunyuan_vae(vae[1], "cpu").vae.encode(x).latent_dist.mode()[0]
    image = cache["latents_image_3x4x6_float32"]
    torch.testing.assert_close(image[:32, :1], first, atol=1e-4, rtol=1e-4)
    assert image[32, 0].eq(1).all() and image[:, 1:].eq(0).all()
    model = transformers.SiglipVisionModel.from_pretrained(tmp_path / "siglip" / "image_encoder")
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 28, "width": 28}}
    pixels = transformers.SiglipImageProcessor(**half).preprocess(images=frames[0], return_tensors="pt")
    seen = model(**pixels).last_hidden_state[0]
    torch.testing.assert_close(cache["siglip_float16"].float(), seen, atol=5e-3, rtol=5e-3)
