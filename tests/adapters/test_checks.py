"""Latents and pixels that cannot be used are refused by what they are."""

import pytest
import torch

from kvae_comfyui.adapters import latent_space
from kvae_comfyui.adapters.checks import check_latent, check_tensor, latent_kind

H = latent_space("hunyuan_video")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 8, 8), "an image latent"),
        ((1, 8), "not a latent"),
        ((1, 32, 2, 4, 4), "hunyuan_video_1.5"),
        ((1, 48, 2, 4, 4), "Wan 2.2"),
        ((1, 7, 2, 4, 4), "7 channels, which no known space has"),
    ],
)
def test_a_latent_of_another_shape_is_called_by_its_name(shape, words):
    assert words in latent_kind(shape)
    with pytest.raises(ValueError, match=f"{words}.*; expected a hunyuan_video latent"):
        check_latent(torch.zeros(shape), H)


def test_a_latent_of_the_right_shape_passes_unless_it_is_of_another_space_empty_or_not_finite():
    z = torch.zeros(1, 16, 2, 4, 4)
    assert "hunyuan_video or kvae_3d_1.0" in latent_kind(z.shape)
    check_latent(z, H)
    check_latent(z, H, "hunyuan_video")
    with pytest.raises(ValueError, match="a latent of kvae_3d_1.0; expected a hunyuan_video latent.*not the same mean"):
        check_latent(z, H, "kvae_3d_1.0")
    with pytest.raises(ValueError, match="This latent is empty"):
        check_latent(z[:, :, :0], H)
    z[0, 0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="1 of 512 values"):
        check_latent(z, H)


@pytest.mark.parametrize(("what", "words"), [("latent", "This latent is"), ("pixels", "These pixels are")])
def test_only_dense_tensors_of_floats_pass(what, words):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_tensor(torch.zeros(2, dtype=dtype), what)
    for bad, found in (
        (None, "a NoneType"),
        (torch.zeros(2).int(), "of int32"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
    ):
        with pytest.raises(ValueError, match=f"{words} {found}; expected a tensor of float32, bfloat16 or float16"):
            check_tensor(bad, what)
