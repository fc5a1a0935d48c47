"""The memory of a stream does not grow with the length of the clip, adapter included, and is what a host is told."""

from functools import partial

import pytest
import torch

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.networks import PointwiseNet, Residual
from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.measured import WORKSPACE
from small_models import small

H, K = latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")
NETWORKS = [Residual, PointwiseNet]


def host_on_meta(network):
    """A small KVAE with two adapters, on the meta device, which does no arithmetic."""
    with torch.device("meta"):
        host = HostVAE(small("1.0"), LatentAdapter(network(16, 16), H, K), LatentAdapter(network(16, 16), K, H))
    host.output_device = torch.device("meta")
    return host.requires_grad_(False)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_memory_of_a_stream_is_counted_and_does_not_grow_with_the_length(network):
    host, peaks = host_on_meta(network), []
    for t in (17, 49):
        z = torch.empty(1, 16, t, 8, 8, device="meta")
        counted = (host.memory_used_decode(z.shape, torch.float32, stream=True) - host._adapter_bytes()) / WORKSPACE
        with torch.no_grad(), PeakMemory() as memory:
            for _ in host.decode_stream(z):
                pass
        assert memory.peak <= counted <= 1.3 * memory.peak
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 16 * 32 * 8 * 8 * 4 / 2  # half of what the latents alone grow by
    needs = [host.memory_used_decode((1, 16, t, 16, 16), torch.float32, stream=True) for t in (25, 100, 200)]
    assert max(needs) < 1.01 * min(needs)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_adapter_is_part_of_a_budget(network):
    """The adapter of a picture of 64x64 pixels takes more than the small KVAE needs beside it."""
    z = torch.empty(1, 16, 25, 8, 8, device="meta")
    with_adapter = host_on_meta(network)
    alone = HostVAE(with_adapter.kvae)
    needs = [host.memory_used_decode(z.shape, torch.float32, stream=True) for host in (alone, with_adapter)]
    adapter = with_adapter.vae.decode_adapter.conversion(25, 8, 8, torch.float32)
    assert needs[0] + adapter.kept <= needs[1] - with_adapter._adapter_bytes() <= needs[0] + 1.2 * adapter.peak
    assert (
        with_adapter.memory_used_encode((1, 3, 97, 64, 64), torch.float32)
        >= alone.memory_used_encode((1, 3, 97, 64, 64), torch.float32) + with_adapter._adapter_bytes()
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_an_adapter_after_encoding_takes_no_more_than_the_encoder(network):
    host = host_on_meta(network)
    x = torch.empty(1, 3, 33, 64, 64, device="meta")
    with torch.no_grad(), PeakMemory() as memory:
        host.encode(x)
    held = host._clip_bytes(x.shape, torch.float32) + host._adapter_bytes()
    latents = 3 * 16 * 9 * 8 * 8 * 4  # KVAE's, the result and its copy: a batch is put together
    assert memory.peak <= host.memory_used_encode(x.shape, torch.float32) - held + x.nbytes + latents


@pytest.mark.parametrize("network", NETWORKS)
def test_the_memory_of_encoding_a_stream_grows_by_its_latents_only(network):
    host, peaks = host_on_meta(network), []
    for segments in (4, 12):
        shape = 1, 3, 16 * segments + 1, 64, 64
        chunks = partial(torch.empty(shape, device="meta").split, 16, dim=2)
        with torch.no_grad(), PeakMemory() as memory:
            host.encode_stream(chunks, shape)
        peaks.append(memory.peak)
    latents = 16 * 32 * 8 * 8 * 4
    assert peaks[1] - peaks[0] <= 3 * latents  # KVAE's, those put together, and the result
    assert 3 * latents < 128 * 3 * 64 * 64 * 4 / 8  # far below the pixels


def test_a_clip_that_comes_in_chunks_has_the_same_latents():
    host = HostVAE(small("2.0-t4s8"), None, LatentAdapter(Residual(16, 16), latent_space("kvae_3d_2.0_t4s8"), H))
    x, told = torch.rand(1, 3, 37, 32, 48) * 2 - 1, []
    host.on_progress = lambda done, total: told.append((done, total))
    with torch.no_grad():
        z = host.encode_stream(lambda: x.split(11, dim=2), x.shape)
        assert told == [(0, 10), (5, 10), (9, 10), (10, 10)]
        assert torch.equal(z, host.encode(x))
