"""The toy of the Video-Free LoRA: its world is what it says, it judges right, and rows differ by what they name."""

import argparse
from dataclasses import replace

import pytest
import torch

import needs
from kvae_comfyui.benchmarks import video_free_lora
from kvae_comfyui.benchmarks.toy import judge, lora, masks, rows, world
from kvae_comfyui.benchmarks.toy.base import BaseConfig, new_network
from kvae_comfyui.benchmarks.toy.embedder import WIDTH, new_backbone
from kvae_comfyui.benchmarks.toy.measure import Found
from kvae_comfyui.training.vfl.appearance import moved
from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.identity import Backbone, Embedder, Head
from kvae_comfyui.training.vfl.lora import lora_parameters

SHOWN = world.sprites(40, world.NEW, Draws("test"))


class Grey(torch.nn.Module):
    """Takes every picture for the same."""

    def forward(self, p_B3HW):
        return torch.nn.functional.normalize(torch.ones(len(p_B3HW), 4), dim=1)


def test_a_clip_moves_its_sprite_as_the_prompt_says():
    y, masks = SHOWN.clips(), SHOWN.masks()
    assert (masks.sum((2, 3)) == world.SPRITE**2).all()  # it never leaves the picture
    for b in range(len(SHOWN)):
        down, right = (world.BLOCK * SHOWN.step_B2[b]).tolist()
        assert (down, right) != (0, 0)
        for t in range(1, world.FRAMES):
            assert torch.equal(y[b, :, t], y[b, :, t - 1].roll((down, right), (1, 2)))
    assert torch.equal(
        y.movedim(1, -1)[~masks], SHOWN.ground_B3[:, None, None, None].expand(y.movedim(1, -1).shape)[~masks]
    )


def test_the_decoder_is_exact():
    y = SHOWN.clips()
    z = world.encode(y)
    assert z.shape[1:] == world.SHAPE
    torch.testing.assert_close(world.decode(z), y, atol=1e-6, rtol=0)
    assert torch.equal(z[:, :, :1], world.encode(y[:, :, :1]))


def test_known_sprites_have_near_colours_and_new_ones_any():
    known, new = (world.sprites(500, each, Draws("domains")).tones_B23 for each in (world.KNOWN, world.NEW))
    assert (known[:, 0] - known[:, 1]).abs().max() <= 0.7 * world.NEAR + 1e-6
    assert 0.4 < (known[:, 0] == known[:, 1]).all(1).float().mean() < 0.6
    assert (new[:, 0] - new[:, 1]).abs().max() > 0.6


def test_the_truth_has_no_error_and_a_standing_sprite_no_way():
    figures = dict(zip(judge.METRICS, judge.metrics(SHOWN.clips(), SHOWN, Grey()).T, strict=True))
    for name in ("place", "tones", "pixels", "off", "head"):
        assert figures[name].abs().max() < 1e-6
    torch.testing.assert_close(figures["path"], torch.ones(len(SHOWN)))
    still = judge.metrics(SHOWN.clips()[:, :, :1].expand(-1, -1, world.FRAMES, -1, -1), SHOWN, Grey())
    assert still[:, judge.METRICS.index("path")].max() < 1e-5
    assert still[:, judge.METRICS.index("change")].max() == 0


def test_errors_count_where_they_are():
    y = SHOWN.clips()
    half, true = SHOWN.tone_masks()[0][:, None], dict.fromkeys(judge.METRICS, 0.0)
    found = dict(zip(judge.METRICS, judge.metrics(y + 0.1 * half, SHOWN, Grey()).mean(0).tolist(), strict=True))
    assert found == pytest.approx(
        true | {"place": 0.005, "tones": 0.005, "pixels": 0.01 * 8 / 144, "path": 1, "change": found["change"]},
        abs=0.02,
    )
    assert found["place"] == pytest.approx(0.005, rel=1e-3) and found["tones"] == pytest.approx(0.005, rel=1e-3)
    assert found["off"] == pytest.approx(0, abs=1e-9)


def test_the_subject_is_found_as_the_clip_moves_it():
    y, masks = SHOWN.clips(), SHOWN.masks()
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    pictures, found = moved(y + 0.02 * noise, y[:, :, 0], masks[:, 0].float())
    true = masks[:, None, 1:].float()
    assert torch.equal(found, true) and torch.equal(pictures, y[:, :, 1:] * true)


def test_a_mask_by_the_borders_colour_is_the_sprite():
    true = SHOWN.masks()[:, 0].float()
    assert torch.equal(masks.mask_of("border", SHOWN, None), true)
    box = masks.mask_of("box", SHOWN, None)
    assert (box * true).sum() == true.sum() and (box.sum((1, 2)) <= 36).all()


def test_interleaved_conditions_are_those_of_other_samples():
    shown = SHOWN[: lora.BATCH]
    given = world.conditions(shown.clips()[:, :, 0], shown.step_B2)
    told = lora.interleaved(given, (0, 2, 5))
    stacked = torch.cat([told[i].latent for i in (0, 2, 5)])
    assert torch.equal(stacked, given.latent.repeat_interleave(3, 0))


def test_the_schedulers_own_levels_are_others():
    needs.package("diffusers", "requirements-vfl.txt")
    found, ours = lora.scheduler_sigmas(), lora.sigmas(judge.STEPS, lora.SHIFT)
    assert found.shape == ours.shape and found[0] == ours[0] == 1 and found[-1] == 0
    assert found[-2] < 0.1 < 0.4 < ours[-2]


def test_few_stills_are_the_same_ones_in_every_step():
    row = rows.STILLS["6 stills"]
    colours = {tuple(each.flatten().tolist()) for step in range(5) for each in lora.stills(row, 0, step).tones_B23}
    assert len(colours) == 6
    assert (
        len({tuple(each.flatten().tolist()) for step in range(5) for each in lora.stills(rows.OURS, 0, step).tones_B23})
        == 30
    )
    anew = lora.stills(rows.FAULTY["fault: anew"], 0, 3)
    assert (anew.tones_B23 == anew.tones_B23[0]).all() and len(anew) == lora.BATCH


def test_a_difference_is_paired():
    base = torch.rand(96, len(judge.METRICS), generator=torch.Generator().manual_seed(0))
    halves = [Found(base / 2, 0.001, 1.0) for _ in range(2)]
    assert video_free_lora.difference(Found(base, 0, 0), halves, 0, True).startswith("−50 ± ")
    same = [Found(base, 0.001, 1.0)]
    assert video_free_lora.difference(Found(base, 0, 0), same, 0, True) == "+0.0 ± 0.0 (+0)"


def test_rows_are_chosen_by_group_or_name():
    parser = argparse.ArgumentParser()
    chosen = video_free_lora.select(["faults", "ours"], parser)
    assert list(chosen) == ["main", "faults"] and list(chosen["main"]) == ["ours"]
    assert len(chosen["faults"]) == len(rows.FAULTS)
    with pytest.raises(SystemExit):
        video_free_lora.select(["theirs"], parser)


def test_without_an_appearance_loss_the_lora_stays_zero_and_with_one_it_moves():
    needs.package("peft", "requirements-vfl.txt")
    embedder = Embedder(Backbone(new_backbone(), "toy", ""), Head((WIDTH, 8, 4)))

    def trained(**changes):
        network = new_network(BaseConfig(layers=1))
        share = lora.train_lora(network, embedder, replace(rows.OURS, steps=2, **changes), 0)
        return share, any(b.any() for name, b in lora_parameters(network).items() if name.endswith(".b"))

    assert trained(weight=0.0) == (0, False)
    for changes in ({}, {"appearance": 3.0, "mask": "border"}, {"appearance": 3.0, "weight": 0.0}):
        share, moved = trained(**changes)
        assert share > 0 and moved
    share, moved = trained(videos=True)
    assert share != share and moved
