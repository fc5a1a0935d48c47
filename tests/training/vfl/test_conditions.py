"""The network's conditions and the loop of inference, against a whole call of diffusers' pipeline."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import needs
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl import conditions as module
from kvae_comfyui.training.vfl.base import check_base, load_encoders
from kvae_comfyui.training.vfl.conditions import (
    conditions,
    encode_picture,
    encode_text,
    flow,
    guided,
)
from kvae_comfyui.training.vfl.path import euler, sigmas
from kvae_comfyui.training.vfl.tiny import save_tiny, tiny_pipeline

needs.package("transformers", "requirements-vfl.txt")
PROMPT = 'A cat holds a sign with "meow" and “purr”.'
STEPS, SHIFT, GUIDANCE = 2, 5.0, 6.0  # the last is the tiny pipeline's


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def picture():
    """A picture that has the size of its bucket, so that nothing is left to crop."""
    return torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def theirs(pipe, picture, noise):
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    options = {"num_frames": 9, "num_inference_steps": STEPS, "output_type": "latent"}
    return pipe(image, PROMPT, latents=noise.clone(), **options).frames


def ours(pipe, picture, x):
    sigma = sigmas(STEPS, SHIFT)
    given = conditions([encode_text(pipe, PROMPT)], [encode_picture(pipe, picture)], "cpu", torch.float32)
    empty = given.with_texts([encode_text(pipe, "")])
    with torch.no_grad():
        for i in range(STEPS):
            _, along = guided(pipe.transformer, given, empty, x, sigma[i], GUIDANCE)
            x = euler(x, along, sigma, i)
    return x


def padded_as_theirs(pipe, monkeypatch):
    """Pad texts to the pipeline's lengths, as it does, in place of the longest of the batch."""
    short = module._padded

    def long(parts, device, dtype):
        values, mask = short(parts, device, dtype)
        length = pipe.tokenizer_max_length if values.shape[2] == 16 else pipe.tokenizer_2_max_length
        missing = length - values.shape[1]
        return F.pad(values, (0, 0, 0, missing)), F.pad(mask, (0, missing))

    monkeypatch.setattr(module, "_padded", long)


def test_our_loop_is_the_pipeline(pipe, picture, monkeypatch):
    noise = torch.randn(1, 32, 3, 2, 2)
    expected = theirs(pipe, picture, noise)
    short = ours(pipe, picture, noise)
    torch.testing.assert_close(short, expected, rtol=0, atol=5e-6)
    padded_as_theirs(pipe, monkeypatch)
    assert torch.equal(ours(pipe, picture, noise), expected)


def test_each_sample_of_a_batch_keeps_its_own_conditions(pipe, picture):
    prompts, pictures = [PROMPT, "A dog."], [picture, picture.flip(2)]
    texts = [encode_text(pipe, prompt) for prompt in prompts]
    frames = [encode_picture(pipe, each) for each in pictures]
    assert [len(text.glyphs) > 0 for text in texts] == [True, False]
    x, levels = torch.randn(2, 32, 3, 2, 2), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        both = flow(pipe.transformer, conditions(texts, frames, "cpu", torch.float32), x, levels)
        for i in range(2):
            given = conditions(texts[i : i + 1], frames[i : i + 1], "cpu", torch.float32)
            alone = flow(pipe.transformer, given, x[i : i + 1], levels[i])
            torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=5e-6)


def test_the_latent_of_a_picture_is_the_mode_scaled(pipe, picture):
    pixels = picture.float()[None, :, None] / 127.5 - 1
    expected = pipe.vae.encode(pixels).latent_dist.mode()[0] * 1.03682
    torch.testing.assert_close(encode_picture(pipe, picture).latent, expected, rtol=0, atol=1e-5)


def test_without_guidance_there_is_one_pass(pipe, picture):
    given = conditions([encode_text(pipe, "")], [encode_picture(pipe, picture)], "cpu", torch.float32)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        v, along = guided(pipe.transformer, given, given, torch.randn(1, 32, 1, 2, 2), torch.tensor(0.5), 1)
    handle.remove()
    assert v is along and len(calls) == 1


def test_encoders_without_the_network_give_the_same(pipe, picture, tmp_path):
    save_tiny(tmp_path)
    encoders = load_encoders(str(tmp_path), "cpu", torch.float32)
    assert encoders.transformer is None and encoders.target_size == pipe.target_size == 32
    for found, expected in zip(encode_text(encoders, PROMPT), encode_text(pipe, PROMPT), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(encode_picture(encoders, picture), encode_picture(pipe, picture), strict=True):
        assert torch.equal(found, expected)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match="no pipeline of HunyuanVideo 1.5 can be read there"):
        load_encoders(str(tmp_path), "cpu", torch.float32)


def test_networks_that_cannot_be_trained_so_are_refused():
    check_base("it", {"use_meanflow": False, "task_type": "i2v"})
    with pytest.raises(UserError, match="it is step-distilled"):
        check_base("it", {"use_meanflow": True, "task_type": "i2v"})
    with pytest.raises(UserError, match="it is a network for t2v; expected image-to-video"):
        check_base("it", {"use_meanflow": False, "task_type": "t2v"})
