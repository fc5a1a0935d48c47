"""The small random HunyuanVideo 1.5: it survives its folder, and its pipeline runs."""

import pytest
import torch
from PIL import Image

import needs
from kvae_comfyui.training.vfl.base import load_pipeline
from kvae_comfyui.training.vfl.tiny import SIDE, save_tiny, tiny_dinov3, tiny_pipeline

needs.package("transformers", "requirements-vfl.txt")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generate(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    picture = Image.effect_mandelbrot((SIDE, SIDE), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    options = {"num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    return pipe(picture, 'a "red" cat', generator=torch.Generator().manual_seed(0), **options).frames


def test_its_folder_gives_the_same_clip(pipe, tmp_path):
    before = torch.random.get_rng_state()
    save_tiny(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    z = generate(pipe)
    assert z.shape == (1, 32, 3, 2, 2) and z.isfinite().all()
    assert torch.equal(generate(load_pipeline(tmp_path)), z)


def test_the_prompt_reaches_the_encoder_without_its_template(pipe):
    """The chat template's system turn is cut off, whatever its length; padding is masked."""
    z, mask, glyphs, glyph_mask = pipe.encode_prompt('a "red" cat', torch.device("cpu"))
    turn = 'a "red" cat<|im_end|>\n<|im_start|>assistant\n'
    assert z.shape == (1, 64, 16) and mask.sum() == len(pipe.tokenizer(turn).input_ids)
    assert glyphs.shape == (1, 32, 24) and glyph_mask.sum() == len('Text "red". ') + 1  # ByT5 ends texts with a token


def test_pictures_of_224_pixels_fit_the_backbone():
    with torch.no_grad():
        states = tiny_dinov3()(torch.randn(2, 3, 224, 224))
    assert states.pooler_output.shape == (2, 32)
