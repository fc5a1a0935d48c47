"""The identity embedding: what DINOv3 is shown, which frames are compared, and where gradients go."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import needs
from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.identity import (
    MEAN,
    STD,
    Backbone,
    Embedder,
    Head,
    draw_frames,
    identity_loss,
    resized,
)
from kvae_comfyui.training.vfl.tiny import BACKBONE_WIDTH, tiny_dinov3

needs.package("transformers", "requirements-vfl.txt")


@pytest.fixture(scope="module")
def backbone():
    return Backbone(tiny_dinov3(), "tiny", "0" * 64)


def unit_rows(*shape: int) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(shape), dim=-1)


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 121])
@pytest.mark.parametrize("count", range(1, 9))
def test_every_frame_but_the_first_can_be_chosen(frames, count):
    """Fewer frames than buckets come from all of them, not from the first ones only."""
    seen = set()
    for k in range(10_000 if frames > count + 1 else 3):
        chosen = draw_frames(Draws(0, "frames", k), frames, count)
        assert chosen == sorted(set(chosen)) and len(chosen) == min(count, max(1, frames - 1))
        seen.update(chosen)
        if len(seen) == frames - 1 and k > 100:
            break
    assert seen == (set(range(1, frames)) if frames > 1 else {0})


def test_five_frames_of_a_clip_come_from_its_five_buckets():
    """120 frames after the first: 12, 24, 36, 48, and 24 near the picture once more."""
    for k in range(300):
        after = np.array(draw_frames(Draws(1, k), 121, 5)) - 1
        counts = np.histogram(after, [0, 12, 36, 72, 120])[0]
        assert counts[3] == 1 and counts[2] == 1 and counts[:2].sum() == 3 and counts[0] >= 1 and counts[1] >= 1


def test_the_same_draws_choose_the_same_frames():
    assert draw_frames(Draws(3), 17, 5) == draw_frames(Draws(3), 17, 5)
    assert len({tuple(draw_frames(Draws(k), 17, 5)) for k in range(50)}) > 20


def test_pictures_are_made_small_as_pillow_does():
    """Pillow's bilinear filter is antialiased; without it, or with a crop, the head would see other pictures."""
    pixels = np.random.default_rng(0).uniform(0, 1, (50, 90)).astype(np.float32)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    found = resized(torch.from_numpy(pixels).expand(1, 3, 50, 90), 32)
    np.testing.assert_allclose(found[0, 1].numpy(), expected, atol=1e-5)


def test_dinov3_is_shown_pictures_as_it_was_trained(backbone):
    p = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    with torch.no_grad():
        expected = tiny_dinov3()(pixel_values=(p - mean) / std).pooler_output
        assert torch.equal(backbone(p), expected)
    assert (backbone.width, backbone.side) == (BACKBONE_WIDTH, 32)


def test_dinov3_never_moves_its_positions_at_random(backbone):
    embedder = Embedder(backbone, Head((BACKBONE_WIDTH, 16, 8), dropout=0.5)).train()
    p = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        embedder.head.eval()
        assert torch.equal(embedder(p), embedder(p))


def test_the_loss_is_one_minus_the_mean_cosine_and_its_gradient_reaches_pixels_alone(backbone):
    embedder = Embedder(backbone, Head((BACKBONE_WIDTH, 16, 8)))
    y, anchor = torch.rand(2, 3, 5, 40, 56, requires_grad=True), unit_rows(2, 8)
    frames = [1, 4]
    loss = identity_loss(embedder, y, frames, anchor)
    with torch.no_grad():
        cosines = [torch.dot(embedder(y[b : b + 1, :, f])[0], anchor[b]) for b in range(2) for f in frames]
    assert loss.item() == pytest.approx(1 - sum(cosines).item() / 4, abs=1e-6)
    loss.backward()
    reached = y.grad.abs().sum((0, 1, 3, 4))
    assert (reached[[1, 4]] > 0).all() and (reached[[0, 2, 3]] == 0).all()
    assert all(p.grad is None and not p.requires_grad for p in embedder.parameters())


def test_an_embedding_has_unit_length_and_its_own_picture_has_no_loss(backbone):
    embedder = Embedder(backbone, Head((BACKBONE_WIDTH, 16, 8)))
    p = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        e = embedder(p)
        torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
        assert identity_loss(embedder, p[:, :, None].expand(-1, -1, 3, -1, -1), [1, 2], e).abs() < 1e-6
