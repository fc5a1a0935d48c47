"""What looks at a sample: the identity loss, the appearance loss, or both, by their weights."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import needs
from kvae_comfyui.training.vfl.identity import Backbone, Embedder, Head
from kvae_comfyui.training.vfl.look import Look
from kvae_comfyui.training.vfl.pictures import Box, read_picture
from kvae_comfyui.training.vfl.samples import Shown, Source
from kvae_comfyui.training.vfl.tiny import tiny_dinov3

needs.package("transformers", "requirements-vfl.txt")
SIDE = 12


def look_of(identity: float, appearance: float, opacity: torch.Tensor | None = None) -> Look:
    """At a clip whose latents are its pixels."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        identity_weight=identity, appearance_weight=appearance, decode_latents=0, decode_scale=0.5, seed=0,
        identity_frames=2,
    )  # fmt: skip
    training = SimpleNamespace(
        config=config, recipe=SimpleNamespace(weight=identity or appearance), decode=lambda z: z,
        embed=Embedder(Backbone(tiny_dinov3(), "", ""), Head((32, 8))), processes=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    first = (255 * smooth(1)[0, :, 0]).byte()
    return Look(training, Shown(3, None, None, first, opacity, first))


def smooth(seed: int) -> torch.Tensor:
    """A clip of three frames that looks the same at half the size."""
    y = torch.rand(1, 3, 3, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(seed))
    return y.repeat_interleave(2, 3).repeat_interleave(2, 4)


def test_both_count_by_their_weights():
    y, teacher = smooth(2), smooth(3)
    identity, appearance, both = look_of(0.5, 0), look_of(0, 3), look_of(0.5, 3)
    found = [each(y, teacher).item() for each in (identity, appearance, both)]
    assert found[0] == identity.identity > 0 and identity.appearance == 0
    assert found[1] == appearance.appearance > 0 and appearance.identity == 0
    assert found[2] == pytest.approx(found[0] + 6 * found[1], rel=1e-6)  # the recipe multiplies by 0.5
    assert (both.identity, both.appearance) == (found[0], found[1])


def test_the_subject_is_what_is_opaque_in_the_size_of_the_clip():
    """A student that moves the opaque part as the teacher does is perfect, whatever surrounds it."""
    opacity = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    opacity[:, 4:8, 2:6] = 255
    look = look_of(0, 3, opacity)
    first = look.shown.first_B3HW("cpu")
    teacher, student = smooth(3), smooth(4)
    for t, (down, right) in ((1, (2, 4)), (2, (-4, 6))):
        for y in (teacher, student):
            y[:, :, t, 4 + down : 8 + down, 2 + right : 6 + right] = first[:, :, 4:8, 2:6]
    assert look(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert look(student + 0.1, teacher).item() == pytest.approx(0.01, rel=1e-4)


def test_a_sample_has_its_pictures_opacity_cut_as_the_picture_is():
    """Of a file with a transparent half, from a cache that shows a part of it."""
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[:, :, 0] = pixels[:, 24:, 3] = 255
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "PNG")
    sample = SimpleNamespace(picture=(out.getvalue(), read_picture(out.getvalue())), secondary=None, skipped=())
    info = SimpleNamespace(crops=1, view=lambda *_: (Box(16, 0, 48, 32), (32, 32)))
    files = SimpleNamespace(info=info, text=lambda _: None, picture=lambda *_: None)
    parts = SimpleNamespace(sample=lambda *_: sample), files, SimpleNamespace(prompt=lambda *_: "")
    shown = Source(*parts, seed=0, opacity=True)(0)
    opaque = shown.opacity_BHW("cpu")
    assert opaque.shape == (1, 32, 32) and not opaque[..., :8].any() and (opaque[..., 8:] == 1).all()
    assert torch.equal(shown.first_B3HW("cpu")[:, 0], opaque)  # red, over black
    assert Source(*parts, seed=0)(0).opacity is None
