"""The appearance loss: it finds the subject where the teacher has it, and is the squared error there alone."""

import pytest
import torch

import needs
from kvae_comfyui.training.vfl.appearance import LEFT, SEEN, appearance_loss, displacements, moved, shifted
from kvae_comfyui.training.vfl.identity import Backbone
from kvae_comfyui.training.vfl.subjects import feature_mask, subject_mask
from kvae_comfyui.training.vfl.tiny import tiny_dinov3

HEIGHT, WIDTH = 9, 14
WAYS = torch.tensor([[[1, 2], [2, 4], [3, -3]], [[0, 0], [-2, 1], [-3, 5]]])  # d_BT2; the last takes a quarter away


@pytest.fixture
def case():
    """Two pictures with a subject of 4x4 pixels each, in a corner; three frames of each, in which it is elsewhere."""
    generator = torch.Generator().manual_seed(0)
    p, ground = (
        torch.rand(2, 3, HEIGHT, WIDTH, generator=generator),
        torch.rand(2, 3, 4, HEIGHT, WIDTH, generator=generator),
    )
    m = torch.zeros(2, HEIGHT, WIDTH)
    m[0, 1:5, 3:7] = m[1, 2:6, 5:9] = 1
    y = ground.clone()
    y[:, :, 0] = p
    for t in range(3):
        mask = shifted(m[:, None], WAYS[:, t])[:, :, None]
        picture = shifted(p * m[:, None], WAYS[:, t])[:, :, None]
        y[:, :, t + 1 : t + 2] = torch.where(mask > 0, picture, y[:, :, t + 1 : t + 2])
    return p, m, y


def test_pixels_move_down_and_to_the_right_and_zeros_come_in():
    x = torch.rand(2, 3, 4, 5)
    found = shifted(x, torch.tensor([[1, -2], [0, 0]]))
    assert torch.equal(found[1], x[1])
    assert torch.equal(found[0, :, 1:, :3], x[0, :, :-1, 2:])
    assert not found[0, :, 0].any() and not found[0, :, :, 3:].any()


def test_the_subject_is_found_where_it_is_also_if_a_quarter_of_it_has_left(case):
    p, m, y = case
    for t, found in enumerate(displacements(y[:, :, 1:], p, m)):
        assert torch.equal(found, WAYS[:, t])


def test_of_all_places_it_is_the_one_of_the_least_error(case):
    """In noise, where nothing fits: as a loop over all places finds it."""
    p, m, _ = case
    y = torch.rand(2, 3, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    for t, found in enumerate(displacements(y, p, m)):
        for b in range(2):
            errors = {}
            for down in range(1 - HEIGHT, HEIGHT):
                for right in range(1 - WIDTH, WIDTH):
                    d = torch.tensor([[down, right]])
                    mask, picture = shifted(m[b : b + 1, None], d), shifted(p[b : b + 1], d)
                    if mask.sum() >= SEEN * m[b].sum():
                        error = ((y[b, :, t] - picture[0]).square() * mask[0]).sum() / mask.sum()
                        errors[down, right] = (error + LEFT * (1 - mask.sum() / m[b].sum())).item()
            assert tuple(found[b].tolist()) == min(errors, key=errors.get)


def test_a_plain_subject_at_the_border_does_not_leave():
    p, m = torch.full((1, 3, HEIGHT, WIDTH), 0.8), torch.zeros(1, HEIGHT, WIDTH)
    m[:, :4, :4] = 1
    y = p * m[:, None] + 0.05 * torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    assert not displacements(y[:, :, None], p, m)[0].any()


def test_a_student_that_is_perfect_on_the_subject_has_no_loss(case):
    """Whatever it shows elsewhere, and in the first frame."""
    p, m, y = case
    target = moved(y, p, m)
    assert target[0].shape == (2, 3, 3, HEIGHT, WIDTH) and target[1].shape == (2, 1, 3, HEIGHT, WIDTH)
    other = torch.rand(y.shape)
    other[:, :, 1:] = torch.where(target[1] > 0, y[:, :, 1:], other[:, :, 1:])
    assert appearance_loss(other, target) == 0
    assert appearance_loss(y + 0.1, target).item() == pytest.approx(0.01, rel=1e-5)


def test_its_gradient_is_that_of_the_mean_square_on_the_subject_alone(case):
    p, m, y = case
    target = moved(y, p, m)
    student = (y + 0.1 * torch.rand(y.shape)).requires_grad_()
    appearance_loss(student, target).backward()
    mask = torch.cat([torch.zeros(2, 1, 1, HEIGHT, WIDTH), target[1]], 2)
    expected = 2 * (student.detach() - y) * mask / (3 * mask.sum())
    torch.testing.assert_close(student.grad, expected, atol=1e-7, rtol=1e-4)


def test_without_a_subject_there_is_no_loss(case):
    p, _, y = case
    loss = appearance_loss(y.requires_grad_(), moved(y, p, torch.zeros(2, HEIGHT, WIDTH)))
    loss.backward()
    assert loss == 0 and not y.grad.any()


def test_an_opaque_part_is_the_subject():
    opacity = torch.tensor([[[0, 0.3, 0.8, 1]]])
    assert torch.equal(subject_mask(None, torch.rand(1, 3, 1, 4), opacity), torch.tensor([[[0.0, 0, 1, 1]]]))


def test_by_features_the_subject_is_what_the_border_is_not():
    """A square before a plain ground, as a DINOv3 of random weights sees it."""
    needs.package("transformers", "requirements-vfl.txt")
    backbone = Backbone(tiny_dinov3(), "tiny", "")
    side, patch = backbone.side, backbone.model.config.patch_size
    true = torch.zeros(1, side, side)
    true[:, patch : 2 * patch, 2 * patch : 3 * patch] = 1
    p = torch.where(true[:, None] > 0, 0.9, 0.2).expand(-1, 3, -1, -1)
    assert torch.equal(feature_mask(backbone, p), true)
    twice = torch.nn.functional.interpolate(p, scale_factor=2, mode="nearest")
    assert torch.equal(feature_mask(backbone, twice)[:, ::2, ::2], true)
