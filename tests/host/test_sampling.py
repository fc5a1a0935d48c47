"""Kandinsky 5 image to video with KVAE, from the image to the frames, in ComfyUI's own nodes on an untrained model."""

import pytest
import torch

from kvae_comfyui.serving.sample_clip import sample_clip


def test_kandinsky_5_makes_a_video_from_an_image(run, load):
    pytest.importorskip("comfy.ldm.kandinsky5.model", reason="needs a ComfyUI with Kandinsky 5")
    vae, model = load(), untrained_kandinsky5()
    image = sample_clip(1, 64, 64)
    pooled = {"pooled_output": torch.zeros(1, 768)}
    text = [[torch.randn(1, 4, 3584), pooled]]
    size = {"width": 64, "height": 64, "length": 9, "batch_size": 1}
    positive, negative, empty, start = run(
        "Kandinsky5ImageToVideo", positive=text, negative=text, vae=vae, start_image=image, **size
    )
    options = {"seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
    (sampled,) = run(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=empty, denoise=1.0, **options
    )
    assert sampled["samples"].shape == (1, 16, 3, 8, 8)
    (latent,) = run("ReplaceVideoLatentFrames", destination=sampled, source=start, index=0)
    (latent,) = run("NormalizeVideoLatentStart", latent=latent, start_frame_count=1, reference_frame_count=2)
    (frames,) = run("VAEDecode", vae=vae, samples=latent)
    assert frames.shape == (9, 64, 64, 3)
    assert frames.isfinite().all()


def untrained_kandinsky5():
    """A MODEL of the video DiT, one block deep, as ComfyUI's loader detects it."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.kandinsky5.model import Kandinsky5

    options = {"num_text_blocks": 1, "num_visual_blocks": 1, "ff_dim": 64, "time_dim": 64}
    dit = Kandinsky5(**options, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast)
    state = {key: 0.02 * torch.randn(value.shape) for key, value in dit.state_dict().items()}
    return comfy.sd.load_diffusion_model_state_dict(state)
