"""Pairs whose latents have two grids: stored as they are, trained on the coarser grid."""

import pytest
import torch

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.adapters.shuffle import on_one_grid, shuffled, unshuffled
from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.training.adapters.closed_form import fit_both_ways
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.dataset import open_pairs
from kvae_comfyui.training.data.pairs import Pair, Shape, find_pairs, pair_shape, read_header, read_pair, write_pair
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.evaluate.latents import check_channels

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path):
    """Pairs of 4 channels of a grid twice as fine as that of 6 channels, as files and as shards."""
    for i, (t, h, w) in enumerate([(6, 9, 8), (6, 9, 8), (3, 5, 31)]):
        pair = Pair(torch.randn(4, t, 2 * h, 2 * w), torch.randn(6, t, h, w), None)
        write_pair(tmp_path / "files" / f"v{i}.safetensors.zst", pair)
    argv = ["--latent-root", str(tmp_path / "files"), "--output-root", str(tmp_path / "shards")]
    assert main(["pack", *argv]) == 0
    return tmp_path / "files", tmp_path / "shards"


def test_both_latents_are_stored_as_they_are(tmp_path, folders):
    files, shards = folders
    path = find_pairs(files)[2]
    shape = Shape(4, 6, 3, 5, 31, (2, 1))
    assert read_header(path)[0] == shape and shape.channels == (16, 6)
    pair = read_pair(path)
    assert pair.z_h.shape == (4, 3, 10, 62) and pair.z_k.shape == (6, 3, 5, 31)
    assert main(["unpack", "--latent-root", str(shards), "--output-root", str(tmp_path / "again")]) == 0
    for one, other in zip(find_pairs(files), find_pairs(tmp_path / "again"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_crops_are_parts_of_both_latents_on_the_coarser_grid(folders):
    for folder in folders:
        pairs = open_pairs(folder)
        for radius in (1, None):
            for group in pairs.groups(radius).values():
                z_h, z_k, weight = pairs.crops(group, radius, 0, 0, CPU)
                assert z_h.shape[1:2] == (16,) and z_h.shape[2:] == z_k.shape[2:] == weight.shape[2:]
                for crop_h, crop_k, i in zip(z_h, z_k, group, strict=True):
                    both = torch.cat([crop_h, crop_k])
                    whole = torch.cat(on_one_grid(*(z[None].float() for z in (pairs[i].z_h, pairs[i].z_k))), 1)[0]
                    windows = whole
                    for axis, n in enumerate(both.shape[1:], 1):
                        windows = windows.unfold(axis, n, 1)
                    assert (windows == both[:, None, None, None]).all((0, 4, 5, 6)).sum() == 1


def test_an_affine_map_between_two_grids_is_recovered_in_closed_form(tmp_path):
    """Both ways: the target is an affine map of the source's neighbourhood, on the coarser grid."""
    torch.manual_seed(0)
    true = Affine(16, 6)
    for i in range(3):
        z_h = torch.randn(4, 5, 40, 48).half()
        with torch.no_grad():
            z_k = true(unshuffled(z_h[None].float(), 2))[0]
        write_pair(tmp_path / f"v{i}.safetensors.zst", Pair(z_h, z_k, None))
    found = fit_both_ways(open_pairs(tmp_path), "cpu")["h2k"].solve()
    for name, weight in true.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, atol=2e-3, rtol=0)
    z_k = torch.randn(6, 5, 40, 48).half()
    back = Affine(6, 16)
    with torch.no_grad():
        z_h = shuffled(back(z_k[None].float()), 2)[0]
    write_pair(tmp_path / "back" / "v.safetensors.zst", Pair(z_h, z_k, None))
    found = fit_both_ways(open_pairs(tmp_path / "back"), "cpu")["k2h"].solve()
    torch.testing.assert_close(found.affine.conv.weight, back.affine.conv.weight, atol=2e-3, rtol=0)


def test_the_text_of_a_shape_of_one_grid_is_that_of_earlier_versions():
    """It is part of the fingerprint by which an unfinished training knows its pairs."""
    assert f"{Shape(16, 16, 9, 30, 40)}" == "Shape(channels_h=16, channels_k=16, t=9, h=30, w=40)"
    assert f"{Shape(16, 64, 9, 30, 40, (2, 1))}" != f"{Shape(16, 64, 9, 30, 40)}"


@pytest.mark.parametrize(
    ("z_h", "z_k"),
    [
        ([4, 3, 10, 12], [6, 3, 5, 4]),  # another factor in each direction
        ([4, 3, 10, 12], [6, 3, 4, 6]),
        ([4, 3, 4, 12], [6, 3, 8, 6]),  # each finer in one direction
        ([4, 5, 8, 8], [6, 3, 4, 4]),
        ([4, 3, 8, 8], [6, 3, 0, 4]),
    ],
)
def test_grids_without_a_whole_factor_are_refused(tmp_path, z_h, z_k):
    with pytest.raises(UserError, match="one grid, or one finer by a whole factor"):
        pair_shape(tmp_path, {"z_h": z_h, "z_k": z_k})
    assert pair_shape(tmp_path, {"z_h": [4, 3, 8, 12], "z_k": [6, 3, 24, 36]}).ratios == (1, 3)


def test_pairs_of_another_grid_than_that_of_their_spaces_are_refused(tmp_path, capsys):
    for i in range(2):
        z_h, z_k = torch.randn(16, 3, 8, 8), torch.randn(16, 3, 4, 4)
        write_pair(
            tmp_path / f"v{i}.safetensors.zst", Pair(z_h, z_k, None)
        )  # without a manifest, of the published VAEs
    argv = ["train", "--latent-root", str(tmp_path), "--out-h2k", str(tmp_path / "o" / "h.safetensors")]
    assert main([*argv, "--device", "cpu"]) == 2
    assert "rows of z_h and z_k are as 2 to 1; expected 1 to 1, for hunyuan_video and" in capsys.readouterr().err


def test_a_pair_of_another_grid_than_that_of_the_adapters_is_refused():
    h2k = LatentAdapter(Affine(64, 64), latent_space("hunyuan_video"), latent_space("kvae_3d_2.0_t4s16"))
    check_channels("good", Pair(torch.zeros(16, 1, 4, 6), torch.zeros(64, 1, 2, 3), None), h2k)
    with pytest.raises(UserError, match="bad: 4 and 4 rows; expected 2 of hunyuan_video for 1 of kvae_3d_2.0_t4s16"):
        check_channels("bad", Pair(torch.zeros(16, 1, 4, 6), torch.zeros(64, 1, 4, 6), None), h2k)
