"""HunyuanVideo's VAE sees whole clips, in no more memory than diffusers' tiles need; folders begun in tiles stay so."""

import json
import weakref

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from conftest import make_videos
from kvae_comfyui.training import hunyuan_whole
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import find_pairs, read_pair
from kvae_comfyui.training.data.videos import Clip, read_clip
from kvae_comfyui.training.hunyuan_attention import attend_frame_by_frame
from kvae_comfyui.training.hunyuan_whole import see_whole_clips
from kvae_comfyui.training.vaes import load_hunyuan_vae

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def small():
    torch.manual_seed(1)
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 16, 16, 24), layers_per_block=1, norm_num_groups=4)
    for parameter in vae.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return vae.eval().requires_grad_(False)


@pytest.fixture
def both_ways():
    """A batch of clips, and the latents and frames that diffusers' network, without any tiles, gives for it."""
    plain = small()
    plain.use_framewise_encoding = plain.use_framewise_decoding = False
    x = torch.rand(2, 3, 25, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.inference_mode():
        z = plain.encode(x).latent_dist.mode()
        return x, z, plain.decode(z).sample


@pytest.mark.parametrize("chunk", [hunyuan_whole.CHUNK, 30_000, 1])
def test_a_whole_clip_gives_what_diffusers_network_gives(both_ways, chunk, monkeypatch):
    """At once, several frames at a time, and frame by frame."""
    monkeypatch.setattr(hunyuan_whole, "CHUNK", chunk)
    vae, (x, z, y) = small(), both_ways
    assert (small().encode(x).latent_dist.mode() - z).abs().max() > 1e-3, "diffusers' tiles would pass, too"
    see_whole_clips(vae)
    with torch.inference_mode():
        torch.testing.assert_close(vae.encode(x).latent_dist.mode(), z, **CLOSE)
        torch.testing.assert_close(vae.decode(z).sample, y, **CLOSE)


def test_a_device_that_is_full_gets_clips_one_by_one_and_maps_on_the_host(both_ways, monkeypatch):
    vae, (x, z, _) = small(), both_ways
    see_whole_clips(vae)
    used = []
    monkeypatch.setattr(hunyuan_whole, "free_memory", lambda device: 1000)
    layers = hunyuan_whole._Layers
    monkeypatch.setattr(hunyuan_whole, "_Layers", lambda *places: used.append(places) or layers(*places))
    with torch.inference_mode():
        torch.testing.assert_close(vae.encode(x).latent_dist.mode(), z, **CLOSE)
    assert used == [(torch.device("cpu"), torch.device("cpu"))] * 2


def test_gradients_are_diffusers_own(both_ways):
    vae, (x, z, _) = small(), both_ways
    see_whole_clips(vae)
    vae.requires_grad_(True)
    mode = vae.encode(x).latent_dist.mode()
    torch.testing.assert_close(mode, z, **CLOSE)
    mode.sum().backward()
    assert all(p.grad is not None for name, p in vae.named_parameters() if name.startswith("encoder"))


class Live(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made within."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, out)
        return out

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
            self.peak = max(self.peak, sum(self.sizes.values()))


@pytest.mark.parametrize("coder", ["encode", "decode"])
def test_whole_clips_need_less_memory_than_diffusers_tiles(coder):
    """The published VAE, 33 frames of 240x320, counted on tensors that hold no values."""
    peaks = []
    for prepare in (lambda vae: [attend_frame_by_frame(each) for each in (vae.encoder, vae.decoder)], see_whole_clips):
        with torch.device("meta"):
            vae = AutoencoderKLHunyuanVideo().eval()
            source = torch.empty((1, 3, 33, 240, 320) if coder == "encode" else (1, 16, 9, 30, 40))
        prepare(vae)
        with torch.no_grad(), Live() as live:
            getattr(vae, f"_{coder}")(source)
        peaks.append(live.peak)
    assert peaks[1] < peaks[0]
    largest = (33 * 240 * 320) * 4 * {"encode": 2 * 128, "decode": 256 + 128}[coder]
    assert peaks[1] < largest + 4 * hunyuan_whole.WORKSPACE * hunyuan_whole.CHUNK


def extract(folder, out):
    words = ["--videos-root", str(folder / "videos"), "--output-root", str(folder / out), "--device", "cpu"]
    return main(["extract", *words, "--num-frames", "21", "--height", "32", "--width", "32"])


def test_pairs_are_of_whole_clips_and_a_folder_begun_in_tiles_continues_in_tiles(tmp_path):
    """Both kinds are never in one folder, and the manifest tells which it is."""
    video, _ = make_videos(tmp_path / "videos", 2, frames=21)
    x = read_clip(Clip(video, 21, 0), 32, 32, "crop")[None]
    whole, tiled = (load_hunyuan_vae("tiny", "cpu", temporal_tiles=tiles).encode(x)[0] for tiles in (False, True))
    assert extract(tmp_path, "pairs") == 0
    manifest = tmp_path / "pairs" / "manifest.json"
    first, second = find_pairs(tmp_path / "pairs")
    settings = json.loads(manifest.read_text())
    assert settings["settings"]["temporal_tiles"] is False
    torch.testing.assert_close(read_pair(first).z_h.float(), whole, atol=2e-3, rtol=2e-3)

    del settings["settings"]["temporal_tiles"]  # as before there was a choice
    manifest.write_text(json.dumps(settings))
    first.unlink()
    kept = second.read_bytes()
    assert extract(tmp_path, "pairs") == 0
    assert second.read_bytes() == kept and "temporal_tiles" not in json.loads(manifest.read_text())["settings"]
    torch.testing.assert_close(read_pair(first).z_h.float(), tiled, atol=2e-3, rtol=2e-3)
    assert (whole - tiled).abs().max() > 0.05
