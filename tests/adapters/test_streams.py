"""An adapter converts a clip piece by piece: the same values as for the whole clip, in memory that is counted."""

import random

import pytest
import torch

from conftest import shared
from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.adapters.hybrid import HybridVAE
from kvae_comfyui.adapters.networks import Affine, PointwiseNet, Residual
from kvae_comfyui.adapters.published import PUBLISHED_FILES
from kvae_comfyui.adapters.spaces import latent_space
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import Execution
from kvae_comfyui.kvae.engine.plan import MARGIN
from kvae_comfyui.kvae.frames import regroup, with_last
from kvae_comfyui.serving.host_vae import HostVAE
from small_models import assert_same, joined, small

H, K = latent_space("hunyuan_video"), latent_space("kvae_3d_1.0")
H15, K2, K16 = (latent_space(name) for name in ("hunyuan_video_1.5", "kvae_3d_2.0_t4s8", "kvae_3d_2.0_t4s16"))
CAUSAL = [Residual(16, 16), Residual(32, 64, 8, 1), Residual(64, 32, 16, 0), Affine(16, 16), Affine(64, 32, 1)]


def adapter(network, std=0.2):
    """A frozen adapter with random weights, for spaces with the network's channels."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    spaces = {16: (H, K), 32: (H15, K16), 64: (K16, H15)}
    return LatentAdapter(network, *spaces[network.config["in_channels"]]).eval().requires_grad_(False)


def name_of(network):
    return f"{type(network).__name__}{list(network.config.values())}"


def trials(count):
    """Shapes, dtypes and memory formats of latents, [B, t, h, w] of every length from one frame to four pieces."""
    rng = random.Random(0)
    for t in range(1, count + 1):
        sides = rng.choice([1, 1, 2]), t, rng.randint(1, 9), rng.randint(1, 11)
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
        yield sides, dtype, rng.choice([torch.contiguous_format, torch.channels_last_3d])


def latents(channels, sides, dtype, layout=torch.contiguous_format):
    return (torch.randn(sides[0], channels, *sides[1:]) + 0.5).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("network", CAUSAL, ids=name_of)
def test_a_stream_of_a_causal_adapter_is_the_whole_clip_bit_for_bit(network):
    """On this machine's CPU, where both lie in the same memory format."""
    each = adapter(network)
    with torch.no_grad():
        for sides, dtype, layout in trials(18):
            z = latents(network.config["in_channels"], sides, dtype, layout)
            pieces = list(each.stream(z))
            assert [piece.shape[2] for piece in pieces[:-1]] == [5, 4, 4, 4][: len(pieces) - 1]
            whole = each(z.contiguous(memory_format=torch.channels_last_3d))
            assert torch.equal(torch.cat(pieces, 2), whole)
            assert torch.equal(each.convert(z), whole)


@pytest.mark.parametrize("name", ["random", *PUBLISHED_FILES])
def test_a_stream_of_a_published_adapter_is_the_whole_clip_except_for_rounding(name):
    if name == "random":
        each = adapter(PointwiseNet(16, 16), std=0.5)
    else:
        each = load_adapter(shared(f"seed_adapters/{name}"))
    with torch.no_grad():
        for sides, dtype, layout in trials(18):
            z = latents(16, sides, dtype, layout) * torch.linspace(1, 3, sides[1])[:, None, None].to(dtype)
            whole = each(z)
            tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            assert_same(torch.cat(list(each.stream(z)), 2).float(), whole.float(), tolerance)
            assert torch.equal(each.convert(z), each.convert(z.contiguous()))  # whatever the caller's format
            assert each.convert(z).dtype == dtype


@pytest.mark.parametrize("network", [Residual(16, 16, 8, 1), PointwiseNet(16, 16)], ids=name_of)
@pytest.mark.parametrize("segment", [4, 8, 16])
def test_a_decoder_gets_the_same_latents_in_segments_of_any_length(network, segment):
    kvae, each = small("2.0-t4s8"), adapter(network)
    each.target = K2
    vae, execution = HybridVAE(kvae, each), Execution(segment)
    with torch.no_grad():
        for t in (1, 6, 12):
            z = torch.randn(1, 16, t, 2, 4)
            parts = list(vae.decode_parts(z, execution))
            assert torch.equal(torch.cat([part.x for part in parts], 2), kvae.decode(vae.to_kvae(z), execution))
            assert [part.where[2].start for part in parts] == [0, *(part.where[2].stop for part in parts[:-1])]
            assert torch.equal(joined(vae.decode_stream(z, execution)), vae.decode(z, execution))
        tiled = Execution(segment, tiles=(1, 2))
        out = torch.empty(1, 3, 45, 16, 32)
        for part in vae.decode_parts(z, tiled):
            part.put(out)
        assert_same(out, kvae.decode(vae.to_kvae(z), execution))


@pytest.mark.parametrize("network", [Residual(16, 16, 8, 1), PointwiseNet(16, 16)], ids=name_of)
def test_gradients_of_a_stream_are_those_of_the_whole_clip(network):
    each = adapter(network).requires_grad_(True).double()
    z, weight = torch.randn(1, 16, 11, 3, 4).double().requires_grad_(), torch.randn(1, 16, 11, 3, 4).double()
    wanted = [z, *each.parameters()]
    found, expected = (torch.autograd.grad((y * weight).sum(), wanted) for y in (each.convert(z), each(z)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_stream_of_another_space_is_refused_before_any_work():
    each = adapter(Affine(16, 16))
    for wrong in (torch.zeros(1, 32, 3, 4, 4), torch.zeros(16, 3, 4, 4)):
        for convert in (each.convert, lambda z: next(each.stream(z))):
            with pytest.raises(ValueError, match="a hunyuan_video latent is"):
                convert(wrong)


@pytest.mark.parametrize("network", [Residual(16, 16, 8, 1), PointwiseNet(16, 16)], ids=name_of)
@pytest.mark.parametrize("way", ["decode", "decode_stream"])
def test_after_memory_has_run_out_the_adapter_begins_again_too(network, way):
    kvae, each = small("2.0-t4s8"), adapter(network)
    each.target = K2
    host, z = HostVAE(kvae, each), torch.randn(1, 16, 14, 4, 4)
    decode_stream, tries = kvae.decode_stream, []

    def small_card(latents, *rest):
        tries.append(latents)
        for i, frames in enumerate(decode_stream(latents, *rest)):
            if len(tries) == 1 and i == 2:
                raise torch.OutOfMemoryError("small card")
            yield frames

    with torch.no_grad():
        whole = host.decode(z)
        kvae.decode_stream = small_card
        again = host.decode(z) if way == "decode" else joined(host.decode_stream(z))
    assert len(tries) == 2
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-4)


# ---- memory


@pytest.mark.parametrize("network", [*CAUSAL, PointwiseNet(16, 16), PointwiseNet(16, 16, 64)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_stream_takes_is_counted_beforehand(network, dtype):
    each = adapter(network)
    for t, h, w in ((1, 16, 20), (4, 12, 15), (9, 30, 30), (22, 16, 24)):
        z, kept = latents(network.config["in_channels"], (1, t, h, w), dtype), 0
        with torch.no_grad(), PeakMemory() as memory:
            for _ in with_last(regroup(each.stream(z), 5, 4)):  # as the decoder reads it
                kept = max(kept, memory.now)
        counted = each.conversion(t, h, w, dtype)
        assert memory.peak <= MARGIN * counted.peak <= 2.2 * memory.peak  # a plan has this margin for small tensors
        assert counted.kept <= counted.peak
        assert t == 1 or kept <= counted.kept  # after the last piece, nothing runs beside it


def test_the_count_of_the_default_adapter_is_at_most_a_fifth_too_high():
    each = adapter(Residual(16, 16))
    for t, h, w in ((13, 16, 16), (22, 30, 52)):
        with torch.no_grad(), PeakMemory() as memory:
            for _ in with_last(regroup(each.stream(torch.randn(1, 16, t, h, w)), 5, 4)):
                pass
        assert each.conversion(t, h, w, torch.float32).peak <= 1.2 * memory.peak
