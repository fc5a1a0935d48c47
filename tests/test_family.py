"""The whole family: exact, however it is cut into segments and strips, in memory that does not grow with the clip."""

import copy

import plain_kvae
import pytest
import torch

from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import FAMILY, KVAE, KVAEConfig, Method, Norms, Posterior
from kvae_comfyui.kvae.tiles import needed_to_decode, needed_to_encode

SMALL = {
    "1.0": KVAEConfig((32, 32, 64, 64), (32, 32, 64, 64), num_res_blocks=1),
    "2.0-t4s8": KVAEConfig((8, 8, 16, 16), (8, 8, 16, 16), num_res_blocks=1, norm="rms", downsample_version=2),
    "2.0-t4s16": KVAEConfig(
        (4, 8, 8, 16, 16),
        (4, 16, 16, 16, 32),
        num_res_blocks=1,
        z_channels=64,
        temporal_start_level=1,
        norm="rms",
        downsample_version=2,
        padding="zeros",
    ),
}
TWO = ["2.0-t4s8", "2.0-t4s16"]
STRIPS = [Method(strip_bytes=1, recompute=recompute) for recompute in range(4)]  # two rows at a time


def small(name: str) -> KVAE:
    """A small model of that kind, every weight at random and frozen."""
    kvae = KVAE(SMALL[name]).eval().requires_grad_(False)
    for key, parameter in kvae.named_parameters():
        if parameter.ndim < 2 or key.endswith("gamma"):
            torch.nn.init.normal_(parameter, mean=float(key.endswith("gamma")), std=0.1)
    return kvae.fold()


def clip(kvae: KVAE, frames: int, rows: int = 2, columns: int = 3, batch: int = 1) -> torch.Tensor:
    side = kvae.config.spatial_factor
    return torch.rand(batch, 3, frames, rows * side, columns * side) * 2 - 1


def latent(kvae: KVAE, frames: int, rows: int = 2, columns: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, kvae.config.z_channels, frames, rows, columns)


def joined(stream):
    parts = list(stream)
    return torch.cat([part.mean if isinstance(part, Posterior) else part for part in parts], dim=2)


def assert_same(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert ((a - b).norm() / b.norm()).item() <= tolerance


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [("1.0", 617_982_115, 364), ("2.0-t4s8", 641_040_675, 312), ("2.0-t4s16", 1_738_878_243, 378)],
)
def test_the_published_sizes(name, parameters, keys):
    with torch.device("meta"):
        kvae = KVAE(FAMILY[name])
    assert sum(p.numel() for p in kvae.parameters()) == parameters
    assert len(kvae.state_dict()) == keys
    assert kvae.config.spatial_factor == (16 if name.endswith("s16") else 8)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("frames", [1, 5, 17, 25])
def test_two_equals_the_whole_clip_at_once(name, frames):
    kvae = small(name)
    state = kvae.state_dict()
    x, z = clip(kvae, frames), latent(kvae, (frames - 1) // 4 + 1)
    expected = plain_kvae.encode(state, kvae.config, x)
    posterior = kvae.posterior(x)
    assert_same(torch.cat([posterior.mean, posterior.logvar], 1), expected)
    assert_same(kvae.decode(z), plain_kvae.decode(state, kvae.config, z))


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("segment", [4, 8, 12])
def test_two_is_the_same_for_every_segmentation(name, segment):
    kvae = small(name)
    x, z = clip(kvae, 21), latent(kvae, 6)
    assert_same(kvae.encode(x, Method(segment)), kvae.encode(x))
    assert_same(kvae.decode(z, Method(segment)), kvae.decode(z))


def test_one_is_defined_by_its_segments():
    with pytest.raises(ValueError, match="segments of 4 frames; this model has GroupNorm over a segment"):
        small("1.0").decode(torch.randn(1, 16, 2, 2, 2), Method(segment=4))
    with pytest.raises(ValueError, match="segments of 6 frames; expected a multiple of 4"):
        small("2.0-t4s8").decode(torch.randn(1, 16, 2, 2, 2), Method(segment=6))
    with pytest.raises(ValueError, match="segments of 4 frames are too short to compute again what they remember"):
        small("2.0-t4s8").decode(torch.randn(1, 16, 2, 2, 2), Method(segment=4, recompute=3))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", [Method(), *STRIPS], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_strips_equal_the_modules_themselves(name, method, batch):
    """The layers' own forward, which training runs through, is the reference; diffusers is elsewhere."""
    kvae = small(name)
    x, z = clip(kvae, 21, batch=batch), latent(kvae, 6, batch=batch)
    with torch.enable_grad():
        by_modules = joined(kvae.encode_stream(x.clone().requires_grad_())), kvae.decode(z.clone().requires_grad_())
    assert_same(kvae.encode(x, method), by_modules[0])
    assert_same(kvae.decode(z, method), by_modules[1])


@pytest.mark.parametrize("name", SMALL)
def test_what_is_remembered_may_be_computed_again(name):
    """In three segments, the one in the middle from one past and for another."""
    kvae, method = small(name), Method(strip_bytes=1, recompute=3)
    x, z = clip(kvae, 37), latent(kvae, 10)
    assert_same(kvae.encode(x, method), kvae.encode(x))
    assert_same(kvae.decode(z, method), kvae.decode(z))


def test_with_the_statistics_of_the_whole_picture_tiles_of_one_are_exact():
    kvae = small("1.0")
    z = latent(kvae, 6, rows=28)
    x = clip(kvae, 21, rows=28)
    for stream, source, needed, side in (
        (kvae.decode_stream, z, needed_to_decode, 8),
        (kvae.encode_stream, x, needed_to_encode, 1),
    ):
        norms = Norms()
        whole = joined(stream(source, norms=norms))
        _, end = needed(kvae.config, (0, 2))
        assert end < 28
        tile = source[:, :, :, : end * (8 // side)]
        assert_same(joined(stream(tile, norms=norms))[:, :, :, : 2 * side], whole[:, :, :, : 2 * side])
        own = joined(stream(tile))[:, :, :, : 2 * side]
        assert (own - whole[:, :, :, : 2 * side]).norm() > 1e-3 * own.norm()


@pytest.mark.parametrize("name", SMALL)
def test_any_length_and_size(name):
    """Padded by hand: the last frame, row and column, up to 4n + 1 frames and whole latents."""
    kvae = small(name)
    side = kvae.config.spatial_factor
    x = torch.rand(1, 3, 19, 2 * side - 3, side + 1) * 2 - 1
    t, h, w = torch.arange(21).clamp(max=18), torch.arange(2 * side), torch.arange(2 * side).clamp(max=side)
    by_hand = x[:, :, t][:, :, :, h.clamp(max=2 * side - 4)][..., w]
    assert torch.equal(kvae.encode(x), kvae.encode(by_hand))


@pytest.mark.parametrize("name", SMALL)
def test_frames_may_come_in_any_chunks(name):
    kvae = small(name)
    x = clip(kvae, 23, 1, 2)
    chunks = (chunk for chunk in x.split([1, 4, 9, 2, 7], dim=2))
    assert torch.equal(joined(kvae.encode_stream(chunks)), kvae.encode(x))
    with pytest.raises(ValueError, match="no frames to encode"):
        list(kvae.encode_stream(iter(())))


@pytest.mark.parametrize("name", SMALL)
def test_memory_formats(name):
    kvae = small(name)
    x, z = clip(kvae, 5), latent(kvae, 2)
    expected = kvae.encode(x), kvae.decode(z)
    for change in (
        lambda a: a.to(memory_format=torch.channels_last_3d),
        lambda a: a.transpose(3, 4).contiguous().transpose(3, 4),
        lambda a: torch.cat([a, a], dim=4)[..., : a.shape[4]],
    ):
        assert_same(kvae.encode(change(x)), expected[0])
        assert_same(kvae.decode(change(z)), expected[1])
    for module in kvae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    assert_same(kvae.encode(x), expected[0])
    assert_same(kvae.decode(z), expected[1])


@pytest.mark.parametrize("name", SMALL)
def test_interleaved_streams_give_the_bits_that_each_gives_alone(name):
    kvae = small(name)
    a, b = latent(kvae, 6, 1, 2), latent(kvae, 6, 2, 1)
    alone = [list(kvae.decode_stream(z)) for z in (a, b)]
    for i, pieces in enumerate(zip(kvae.decode_stream(a), kvae.decode_stream(b), strict=True)):
        assert torch.equal(pieces[0], alone[0][i]) and torch.equal(pieces[1], alone[1][i])


@pytest.mark.parametrize("name", SMALL)
def test_memory_does_not_grow_with_the_clip(name):
    kvae = KVAE(SMALL[name]).requires_grad_(False).to("meta").fold()
    z_channels, side = kvae.config.z_channels, kvae.config.spatial_factor

    def peaks(t: int) -> tuple[int, int]:
        z = torch.empty(1, z_channels, t, 2, 2, device="meta")
        frames = torch.empty(1, 3, 1, 2 * side, 2 * side, device="meta")
        with PeakMemory() as decoding:
            for _ in kvae.decode_stream(z):
                pass
        with PeakMemory() as encoding:
            for _ in kvae.encode_stream(frames for _ in range(4 * t - 3)):
                pass
        return decoding.peak, encoding.peak

    assert peaks(21) == peaks(13)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_with_and_without_checkpointing(name):
    kvae = small(name).requires_grad_(True)
    z = latent(kvae, 6, 1, 1)

    def gradients() -> tuple[list[torch.Tensor], int]:
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        kvae.zero_grad()
        source = z.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = kvae.decode(source).square().mean()
        loss.backward()
        return [source.grad, *(p.grad for p in kvae.decoder.parameters())], saved

    plain, plain_bytes = gradients()
    kvae.decoder.gradient_checkpointing = True
    again, fewer_bytes = gradients()
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain)
    assert fewer_bytes < 0.5 * plain_bytes


def test_progress_is_told_and_may_cancel():
    kvae = small("2.0-t4s8")
    told = []
    kvae.decode(latent(kvae, 10, 1, 1), progress=told.append)
    assert told == [17, 33, 37]
    told.clear()
    kvae.encode(clip(kvae, 35, 1, 1), progress=told.append)
    assert told == [17, 33, 35]

    class Cancelled(Exception):
        pass

    def cancel(frames):
        raise Cancelled(frames)

    with pytest.raises(Cancelled, match="17"):
        kvae.decode(latent(kvae, 10, 1, 1), progress=cancel)


@pytest.mark.parametrize("name", SMALL)
def test_folded_weights_follow_the_published_ones(name):
    kvae = small(name)
    z = latent(kvae, 3, 1, 2)
    before = kvae.decode(z)
    state = {key: 1.1 * tensor for key, tensor in kvae.state_dict().items()}
    assert not any("folded" in key for key in state)
    kvae.load_state_dict(state)  # forgets what was folded
    changed = kvae.decode(z)
    assert not torch.allclose(before, changed, rtol=1e-2)
    assert_same(kvae.fold().decode(z), changed)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name):
    kvae = small(name)
    z = latent(kvae, 3)
    exact = kvae.decode(z)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        y = copy.deepcopy(kvae).to(dtype).decode(z)
        assert y.dtype == dtype
        assert ((y - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("name", ["1.0", "2.0-t4s16"])
def test_a_segment_can_be_exported_and_compiled(name):
    """As a pure function of latents and cache; the inductor backend only generates code for what is captured here."""
    kvae = small(name)

    class Segment(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = kvae.decoder

        def forward(self, z, cache):
            cache = dict(cache)
            return self.decoder(z, cache), cache

    z = latent(kvae, 9, 1, 1)
    expected = kvae.decode(z)
    first, cache = Segment()(z[:, :, :5], {})
    exported = torch.export.export(Segment(), (z[:, :, 5:], cache)).module()
    compiled = torch.compile(Segment(), backend="aot_eager", fullgraph=True)
    for later in (exported, compiled):
        assert_same(torch.cat([first, later(z[:, :, 5:], cache)[0]], 2), expected)


@pytest.mark.parametrize("name", TWO)
def test_tiles_of_two_are_exact(name):
    """And no smaller halo would do: the halo is what is computed to be needed, and all of it is."""
    kvae = small(name)
    x, z = clip(kvae, 6, 46, 2), latent(kvae, 2, 46, 2)
    told = []
    assert_same(kvae.decode(z, Method(tiles=(2, 2)), told.append), kvae.decode(z))
    assert told[-1] == 5 and told == sorted(told)
    x = x[..., :-3, :-1]  # sides that are not whole latents
    assert_same(kvae.encode(x, Method(tiles=(2, 1))), kvae.encode(x))
    with pytest.raises(ValueError, match="a stream gives whole pictures"):
        next(kvae.decode_stream(z, Method(tiles=(2, 1))))


@pytest.mark.parametrize("name", SMALL)
def test_blended_tiles_with_all_that_is_needed_in_common_are_exact_but_for_statistics(name):
    """Where no norm runs over the picture, an overlap of twice the halo leaves nothing to blend but the same."""
    kvae = small(name)
    x, z = clip(kvae, 6, 46, 2), latent(kvae, 2, 46, 2)
    told = []
    for run, source, halo in ((kvae.decode, z, 18), (kvae.encode, x, 14)):
        whole, few, many = run(source), *(run(source, Method(tiles=(2, 1), overlap=n)) for n in (2, 2 * halo))
        assert 0 < (few - whole).norm() < 0.5 * whole.norm()
        if kvae.config.per_position:
            middle = whole.shape[3] // 2
            assert_same(many[:, :, :, middle], whole[:, :, :, middle])
    kvae.decode(z, Method(tiles=(2, 1), overlap=4), told.append)
    assert told[-1] == 5 and told == sorted(told)


def test_one_has_no_exact_tiles():
    with pytest.raises(ValueError, match="tiles cannot be exact where GroupNorm runs over the whole picture"):
        small("1.0").decode(torch.randn(1, 16, 1, 4, 4), Method(tiles=(2, 1)))


@pytest.mark.parametrize("name", TWO)
def test_halos_are_just_what_is_needed(name):
    """A gradient says which latents a pixel depends on, and which pixels a latent does."""
    config = SMALL[name]
    kvae = small(name)
    side, middle = config.spatial_factor, 20
    z = latent(kvae, 1, 41, 1).requires_grad_()
    rows = kvae.decode(z)[..., middle * side : (middle + 1) * side, :].abs().sum()
    reached = torch.autograd.grad(rows, z)[0].abs().sum((0, 1, 2, 4)).nonzero()
    lo, hi = needed_to_decode(config, (middle, middle + 1))
    assert (reached.min(), reached.max() + 1) == (lo, hi)
    x = clip(kvae, 1, 41, 1).requires_grad_()
    reached = torch.autograd.grad(kvae.encode(x)[..., middle, :].abs().sum(), x)[0].abs().sum((0, 1, 2, 4)).nonzero()
    lo, hi = needed_to_encode(config, (middle, middle + 1))
    assert (reached.min() // side, reached.max() // side + 1) == (lo, hi)
