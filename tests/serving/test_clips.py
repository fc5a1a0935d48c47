"""Clips are padded to 4n + 1 frames before encoding, and cut to their own length after decoding."""

import pytest
import torch

from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.kvae import pad_frames
from kvae_comfyui.serving.clips import check_replaceable, cut_clip, frames_to_keep, pad_clip
from kvae_comfyui.serving.sample_clip import sample_clip


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 6, 9])
def test_a_clip_is_padded_as_kvae_pads_a_video(frames):
    clip = sample_clip(frames, 8, 8)
    expected = pad_frames(clip.movedim(-1, 0)[None])[0].movedim(0, -1)
    assert torch.equal(pad_clip(clip, 4), expected)


def test_the_frames_of_the_clip_are_kept():
    assert frames_to_keep(9, 6) == 6
    assert frames_to_keep(9, None) == frames_to_keep(9, 20) == 9


def test_each_clip_of_a_batch_is_cut():
    segments = iter(torch.arange(18).split([5, 4, 5, 4]))  # two clips of nine
    for first in (0, 9):
        clip = torch.cat(list(cut_clip(segments, decoded=9, kept=6)))
        assert clip.tolist() == [*range(first, first + 6)]


@pytest.mark.parametrize(("side", "rows"), [(8, 5), (16, 4)])
def test_a_clip_replaces_latents_of_what_is_left_of_it_after_its_sides_are_cropped(side, rows):
    space = latent_space("hunyuan_video")  # which a KVAE of a coarser grid can serve, too: its side is 16
    check_replaceable((1, 16, 3, rows, 4), (9, 40, 32, 3), space, side)
    with pytest.raises(ValueError, match=rf"This clip gives a latent \[1, 16, 3, {rows}, 4\]"):
        check_replaceable((1, 16, 3, 9 - rows, 4), (9, 40, 32, 3), space, side)
