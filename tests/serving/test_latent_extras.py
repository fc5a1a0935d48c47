"""What a latent holds beside its samples is saved with them; a file that says something else is refused."""

import pytest
import torch
from safetensors.torch import save_file

from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.serving.inspect import describe_file
from kvae_comfyui.serving.latent_extras import Extras
from kvae_comfyui.serving.latent_files import load_latent
from kvae_comfyui.serving.latent_writers import save_latent

Z, AUDIO = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 8, 26, 16)
MASKS = torch.rand(1, 1, 3, 4, 4).half(), torch.zeros(1, 8, 26, 16)


@pytest.mark.parametrize(
    "extras",
    [
        Extras(),
        Extras(MASKS[:1]),
        Extras(MASKS, nested=True, batch_index=(3,), sample_rate=44100),
        Extras(MASKS[:1], nested=True),
        Extras((torch.ones(1, 1, 1, 1).expand(2, 1, 4, 4),), batch_index=(0, 0)),
    ],
)
def test_they_are_loaded_bit_for_bit(tmp_path, extras):
    save_latent(tmp_path / "a.latent", Z, "hunyuan_video", 9, {}, [AUDIO], extras=extras)
    found = load_latent(tmp_path / "a.latent").extras
    assert (found.nested, found.batch_index, found.sample_rate) == (
        extras.nested,
        extras.batch_index,
        extras.sample_rate,
    )
    for mask, saved in zip(found.masks, extras.masks, strict=True):
        assert mask.dtype == saved.dtype
        assert torch.equal(mask, saved)


def test_the_report_tells_what_the_masks_keep(tmp_path):
    extras = Extras((MASKS[1] + 0.25, MASKS[1]), nested=True)
    save_latent(tmp_path / "a.latent", Z, None, None, {}, [AUDIO], extras=extras)
    first, second = describe_file(load_latent(tmp_path / "a.latent")).splitlines()[-2:]
    assert first == "It has a noise mask of part 1, [1, 8, 26, 16], from 0.250 (kept) to 0.250 (new)."
    assert second.startswith("It has a noise mask of part 2, [1, 8, 26, 16], from 0.000")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"masks": ("none",)}, "This noise mask is a str; expected a tensor"),
        ({"masks": (torch.zeros(1, 0),)}, r"This noise mask is empty, \[1, 0\]"),
        ({"masks": MASKS}, "has 2 parts; expected"),
        ({"batch_index": (0, -1)}, "batch_index holds -1; expected whole numbers from 0"),
        ({"batch_index": (True,)}, "batch_index holds True"),
        ({"sample_rate": 44.1}, "sample_rate holds 44.1"),
    ],
)
def test_what_no_sampler_reads_is_not_saved(values, message):
    with pytest.raises(ValueError, match=message):
        Extras(**values)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"noise_mask_2": MASKS[0]}, {}, "its noise masks are noise_mask_2; save"),
        ({"noise_mask": MASKS[0], "noise_mask_1": MASKS[1]}, {}, "its noise masks are noise_mask, noise_mask_1"),
        ({f"noise_mask_{n}": torch.ones(1) for n in range(1, 10 + 1)}, {}, "its noise masks are noise_mask_1, "),
        ({"noise_mask": torch.ones(2, dtype=torch.int64)}, {}, "noise mask is of int64"),
        ({}, {"kvae_batch_index": "3"}, "kvae_batch_index is 3; expected a list"),
        ({}, {"kvae_batch_index": "[1000000000]"}, "batch_index holds 1000000000; expected whole numbers from 0 to"),
        ({}, {"kvae_batch_index": "[" * 10**5}, "a.latent: "),
        ({}, {"kvae_sample_rate": "x"}, "a.latent: Expecting value"),
    ],
)
def test_a_file_with_others_is_refused(tmp_path, tensors, metadata, message):
    whole = {"latent_tensor": Z, "latent_format_version_0": torch.empty(0)}
    save_file(whole | tensors, tmp_path / "a.latent", metadata)
    with pytest.raises(WeightsError, match=message):
        load_latent(tmp_path / "a.latent")
