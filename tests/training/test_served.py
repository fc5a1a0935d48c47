"""A KVAE in the place of another VAE, as commands load it."""

import pytest
import torch

from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.kvae import BudgetError, save_kvae
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.served import ServedOptions, load_served
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS
from small_models import small


def served(space="hunyuan_video", ways=("decode", "encode"), **options):
    return load_served(ServedOptions(device="cpu", **options), space, ways)


@pytest.mark.parametrize(("kvae", "space"), [("tiny", "hunyuan_video"), ("tiny-t4s16", "hunyuan_video_1.5")])
def test_a_tiny_kvae_brings_its_adapters(kvae, space):
    vae = served(space, kvae=kvae)
    assert vae.space == SPACES[space]
    z = vae.encode(torch.zeros(1, 3, 5, 32, 48))
    assert vae.decode(z).shape == (1, 3, 5, 32, 48)


def test_native_latents_need_no_adapter():
    vae = served("kvae_3d_1.0", kvae=str(TINY["kvae"]), adapter_h2k="absent.safetensors")
    assert vae.space == SPACES["kvae_3d_1.0"]


@pytest.mark.parametrize(("way", "flag", "other"), [("decode", "h2k", "k2h"), ("encode", "k2h", "h2k")])
def test_an_adapter_that_is_needed_and_missing_is_named(way, flag, other):
    kvae = str(TINY["kvae"])
    with pytest.raises(UserError, match=f"--adapter-{flag} is missing: to {way} hunyuan_video"):
        served(ways=(way,), kvae=kvae, **{f"adapter_{other}": "absent.safetensors"})
    served(ways=(way,), kvae=kvae, **{f"adapter_{flag}": str(TINY_ADAPTERS[flag])})  # the other one is not read


def test_an_adapter_that_is_missing_can_be_tried_with_what_is_there(tmp_path):
    """A published adapter, the tiny KVAE with adapters for the space, or the KVAE that the latents are of."""
    newer = {"kvae": str(tmp_path / "t4s16.safetensors")}
    save_kvae(newer["kvae"], small("2.0-t4s16"), torch.float32, {})
    for space, options, advice in (
        ("hunyuan_video", {"kvae": str(TINY["kvae"])}, "or try the published ones: python -m training fetch"),
        ("hunyuan_video_1.5", newer, "or try this command with --kvae tiny-t4s16, which brings its own"),
        ("hunyuan_video_1.5", {}, "or try this command with --kvae tiny-t4s16, which brings its own"),
        ("kvae_3d_2.0_t4s8", {}, "Give the KVAE that the latents are of: --kvae, a kvae_3d_2.0_t4s8"),
    ):
        with pytest.raises(UserError, match=advice):
            served(space, ("decode",), **options)


def test_the_least_budget_gives_the_same_frames_and_less_is_refused():
    z = 2 * torch.randn(1, 16, 3, 16, 16)
    with pytest.raises(BudgetError) as refused:
        served(memory_gb=0.001).decode(z)
    small = served(memory_gb=refused.value.least.peak / 1e9)
    torch.testing.assert_close(small.decode(z), served().decode(z), atol=1e-4, rtol=0)


def test_precision_is_that_asked_for():
    assert next(served(dtype="bf16").kvae.parameters()).dtype is torch.bfloat16
    assert next(served().kvae.parameters()).dtype is torch.float32
