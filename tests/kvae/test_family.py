"""All models of the family: exact for any segments and strips, in memory that does not grow with the clip."""

import copy

import pytest
import torch

import plain_kvae
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import FAMILY, KVAE, Execution, Recompute
from small_models import SMALL, VERSION_TWO, assert_same, clip, joined, latent, small

STRIPS = [Execution(strip_bytes=1, recompute=level) for level in Recompute]  # two rows at a time


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [("1.0", 617_982_115, 364), ("2.0-t4s8", 641_040_675, 312), ("2.0-t4s16", 1_738_878_243, 378)],
)
def test_parameters_and_keys_are_as_published(name, parameters, keys):
    with torch.device("meta"):
        kvae = KVAE(FAMILY[name])
    assert sum(p.numel() for p in kvae.parameters()) == parameters
    assert len(kvae.state_dict()) == keys
    assert kvae.config.spatial_factor == (16 if name.endswith("s16") else 8)


@pytest.mark.parametrize("name", VERSION_TWO)
@pytest.mark.parametrize("frames", [1, 5, 17, 25])
def test_version_two_equals_the_plain_model_on_the_whole_clip(name, frames):
    kvae = small(name)
    state = kvae.state_dict()
    x, z = clip(kvae, frames), latent(kvae, (frames - 1) // 4 + 1)
    expected = plain_kvae.encode(state, kvae.config, x)
    posterior = kvae.posterior(x)
    assert_same(torch.cat([posterior.mean, posterior.logvar], 1), expected)
    assert_same(kvae.decode(z), plain_kvae.decode(state, kvae.config, z))


@pytest.mark.parametrize("name", VERSION_TWO)
@pytest.mark.parametrize("segment", [4, 8, 12])
def test_version_two_gives_the_same_for_every_segment_length(name, segment):
    kvae = small(name)
    x, z = clip(kvae, 21), latent(kvae, 6)
    assert_same(kvae.encode(x, Execution(segment)), kvae.encode(x))
    assert_same(kvae.decode(z, Execution(segment)), kvae.decode(z))


def test_unsupported_segment_lengths_are_refused():
    with pytest.raises(ValueError, match="segments of 4 frames; this model has GroupNorm over a segment"):
        small("1.0").decode(torch.randn(1, 16, 2, 2, 2), Execution(segment=4))
    with pytest.raises(ValueError, match="segments of 6 frames; expected a multiple of 4"):
        small("2.0-t4s8").decode(torch.randn(1, 16, 2, 2, 2), Execution(segment=6))
    with pytest.raises(ValueError, match="recomputing all maps of full resolution needs 10 or more"):
        small("2.0-t4s8").decode(torch.randn(1, 16, 2, 2, 2), Execution(segment=4, recompute=Recompute.FULL_RESOLUTION))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"recompute": 5}, r"recompute is 5; expected a level of Recompute: NOTHING \(0\), "),
        ({"recompute": -1}, "recompute is -1; expected a level of Recompute"),
        ({"tiles": (0, 1)}, "expected segment, strip_bytes and tiles of at least 1"),
        ({"tiles": (2, 2, 2)}, "tiles is .2, 2, 2.; expected rows and columns of tiles"),
        ({"overlap": -1}, "overlap is -1; expected 0 or more latents, or None for exact tiles"),
        ({"strip_bytes": 0}, "expected segment, strip_bytes and tiles of at least 1"),
        ({"strip_bytes": 64e6}, "expected integers"),
        ({"segment": 0}, "expected segment, strip_bytes and tiles of at least 1"),
        ({"segment": "16"}, "expected integers"),
    ],
    ids=str,
)
def test_executions_that_no_model_supports_are_refused_when_made(numbers, message):
    with pytest.raises(ValueError, match=message):
        Execution(**numbers)


def test_executions_that_a_model_does_not_support_are_refused_before_anything_is_computed():
    one, two = small("1.0"), small("2.0-t4s8")
    for kvae, execution in (
        (one, Execution(segment=4)),
        (one, Execution(tiles=(2, 1))),
        (one, Execution(segment=4, tiles=(2, 1), overlap=2)),
        (two, Execution(segment=6)),
        (two, Execution(segment=6, tiles=(2, 1))),
        (two, Execution(segment=6, tiles=(2, 1), overlap=2)),
        (two, Execution(segment=4, recompute=Recompute.FULL_RESOLUTION)),
    ):
        z, x = latent(kvae, 2, 4, 4), clip(kvae, 5, 4, 4)
        for start in (kvae.decode_parts, kvae.decode_stream) if execution.tiles == (1, 1) else (kvae.decode_parts,):
            with pytest.raises(ValueError, match="segments of|tiles cannot be exact"):
                start(z, execution)
        with pytest.raises(ValueError, match="segments of|tiles cannot be exact"):
            kvae.encode(x, execution)
    for run in (two.decode_stream, two.encode_stream):
        with pytest.raises(ValueError, match="a stream yields whole pictures"):
            run(latent(two, 2), Execution(tiles=(2, 1)))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("execution", [Execution(), *STRIPS], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_strips_equal_the_modules_own_forward(name, execution, batch):
    """The reference is the layers' own forward, which training uses; other tests compare with diffusers."""
    kvae = small(name)
    x, z = clip(kvae, 21, batch=batch), latent(kvae, 6, batch=batch)
    with torch.enable_grad():
        by_modules = joined(kvae.encode_stream(x.clone().requires_grad_())), kvae.decode(z.clone().requires_grad_())
    assert_same(kvae.encode(x, execution), by_modules[0])
    assert_same(kvae.decode(z, execution), by_modules[1])


@pytest.mark.parametrize("name", SMALL)
def test_past_frames_may_be_recomputed(name):
    """In three segments: the one in the middle recomputes past frames, and leaves frames to recompute."""
    kvae, execution = small(name), Execution(strip_bytes=1, recompute=Recompute.FULL_RESOLUTION)
    x, z = clip(kvae, 37), latent(kvae, 10)
    assert_same(kvae.encode(x, execution), kvae.encode(x))
    assert_same(kvae.decode(z, execution), kvae.decode(z))


@pytest.mark.parametrize("name", SMALL)
def test_the_execution_may_change_from_segment_to_segment(name):
    """Memory may become short in the middle of a clip."""
    kvae = small(name)
    z, x = latent(kvae, 18), clip(kvae, 69)
    asked = []

    def execution():
        asked.append(STRIPS[len(asked) % len(STRIPS)])
        return asked[-1]

    with torch.no_grad():
        for way in (kvae.decode_stream, kvae.encode_stream):
            source = z if way == kvae.decode_stream else x
            asked.clear()
            assert_same(joined(way(source, execution)), joined(way(source)))
            assert len(asked) >= 5
        assert_same(kvae.decode(z, lambda: STRIPS[2]), kvae.decode(z))
        assert_same(kvae.encode(x, lambda: STRIPS[2]), kvae.encode(x))


@pytest.mark.parametrize("name", SMALL)
def test_any_length_and_size_equals_padding_by_hand(name):
    """By hand: repeat the last frame, row and column, up to 4n + 1 frames and full latents."""
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


@pytest.mark.parametrize("sizes", [[17, 6], [16, 1, 6], [9, 9, 5], [1] * 23], ids=str)
def test_a_reader_may_reuse_its_buffer(sizes):
    kvae = small("2.0-t4s8")
    x = clip(kvae, 23, 1, 2)

    def read():
        buffer = torch.empty_like(x)
        for chunk in x.split(sizes, dim=2):
            view = buffer[:, :, : chunk.shape[2]]
            yield view.copy_(chunk)
            view.fill_(float("nan"))

    assert_same(joined(kvae.encode_stream(read())), kvae.encode(x))


def test_chunks_of_other_sizes_and_integers_are_refused():
    kvae = small("2.0-t4s8")
    x = clip(kvae, 9, 1, 2)
    with pytest.raises(ValueError, match=r"a chunk has shape \[1, 3, 1, 8, 1\]; expected .*, \[1, 3, T, 8, 16\]"):
        list(kvae.encode_stream(iter([x, x[:, :, :1, :, :1]])))
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"video is {dtype}; expected floating-point values"):
            kvae.encode(x.to(dtype))
        with pytest.raises(ValueError, match=f"latent is {dtype}; expected floating-point values"):
            kvae.decode(latent(kvae, 2).to(dtype))


def test_nan_spreads_to_later_frames_only():
    """The VAE does not check its values; whoever serves it refuses NaN and infinity."""
    kvae = small("2.0-t4s8")
    z = latent(kvae, 10, 1, 1)
    clean = kvae.decode(z)
    z[:, :, 6] = float("nan")
    y = kvae.decode(z)
    assert torch.equal(y[:, :, :21], clean[:, :, :21])  # causal: frames before the NaN do not change
    assert y[:, :, 21:].isnan().all(dim=(0, 1, 3, 4)).any()


@pytest.mark.parametrize("name", SMALL)
def test_any_memory_format_gives_the_same(name):
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
def test_interleaved_streams_give_the_same_bits_as_each_stream_alone(name):
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


def test_progress_is_reported_and_may_cancel_the_run():
    kvae = small("2.0-t4s8")
    reported = []
    kvae.decode(latent(kvae, 10, 1, 1), progress=reported.append)
    assert reported == [17, 33, 37]
    reported.clear()
    kvae.encode(clip(kvae, 35, 1, 1), progress=reported.append)
    assert reported == [17, 33, 35]

    class Cancelled(Exception):
        pass

    def cancel(frames):
        raise Cancelled(frames)

    with pytest.raises(Cancelled, match="17"):
        kvae.decode(latent(kvae, 10, 1, 1), progress=cancel)


@pytest.mark.parametrize("name", SMALL)
def test_other_dtypes_are_close_to_float32(name):
    kvae = small(name)
    z = latent(kvae, 3)
    exact = kvae.decode(z)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        y = copy.deepcopy(kvae).to(dtype).decode(z)
        assert y.dtype == dtype
        assert ((y - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("name", ["1.0", "2.0-t4s16"])
def test_a_segment_can_be_exported_and_compiled(name):
    """As a pure function of latents and cache. The capture is tested here; inductor only generates code for it."""
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
