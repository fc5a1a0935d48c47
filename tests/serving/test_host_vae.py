"""HostVAE equals HybridVAE bit for bit, in segments or tiles, and stays within the memory that a host grants."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kvae_comfyui.adapters import HybridVAE, LatentAdapter, latent_space
from kvae_comfyui.adapters.hybrid import from_kvae_pixels
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import BudgetError, GroupNormStats, WeightsError, load_kvae, plan_decode
from kvae_comfyui.kvae.engine.execution import present
from kvae_comfyui.kvae.engine.tiles import blended_tiling
from kvae_comfyui.serving import host_vae
from kvae_comfyui.serving.host_vae import HostVAE, to_image
from kvae_comfyui.serving.planning import tile_count
from kvae_comfyui.training.vaes import TINY


def adapter(source: str, target: str) -> LatentAdapter:
    return LatentAdapter(Affine(16, 16), latent_space(source), latent_space(target)).requires_grad_(False)


@pytest.fixture
def host(small_kvae):
    """A small KVAE with adapters for HunyuanVideo's latents."""
    return HostVAE(small_kvae, adapter("hunyuan_video", "kvae_3d_1.0"), adapter("kvae_3d_1.0", "hunyuan_video"))


def test_host_vae_equals_hybrid_vae_and_reports_progress_at_the_start_and_after_each_segment(host):
    seen = []
    host.on_progress = lambda done, total: seen.append((done, total))
    z = torch.randn(1, 16, 7, 4, 4)
    hybrid = HybridVAE(host.kvae, host.vae.decode_adapter, host.vae.encode_adapter)
    with torch.no_grad():
        assert torch.equal(host.decode(z), hybrid.decode(z))
        assert seen == [(0, 7), (5, 7), (7, 7)]
        buffer = torch.empty(host.decode_output_shape(z.shape))
        assert host.decode(z, output_buffer=buffer) is buffer
        assert torch.equal(torch.cat(list(host.decode_stream(z)), dim=2), buffer)
        seen.clear()
        x = torch.rand(1, 3, 23, 32, 32) * 2 - 1
        assert torch.equal(host.encode(x, device=torch.device("cpu")), hybrid.encode(x[:, :, :21]))
        assert seen == [(0, 6), (5, 6), (6, 6)]


def test_a_vae_in_bfloat16_keeps_its_adapters_in_float32(small_kvae):
    to_kvae = adapter("hunyuan_video", "kvae_3d_1.0")
    host = HostVAE(small_kvae.bfloat16(), to_kvae)
    with torch.no_grad():
        x = host.decode(torch.randn(2, 16, 2, 4, 4))
    assert x.dtype == torch.float32
    assert to_kvae.network.affine.conv.weight.dtype == torch.float32


def test_an_exception_from_on_progress_stops_the_work(host):
    def cancel(done, total):
        raise KeyboardInterrupt

    host.on_progress = cancel
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        host.decode(torch.randn(1, 16, 7, 4, 4))


STREAMS = {"decode": lambda host, z: host.decode(z), "decode_stream": lambda host, z: list(host.decode_stream(z))}


@pytest.mark.parametrize("way", STREAMS)
def test_on_frames_gets_each_frame_once_as_it_is_decoded_though_memory_runs_out(small_kvae, way):
    host, z, order, shown = HostVAE(small_kvae), torch.randn(2, 16, 10, 8, 8), [], []
    decode_stream, tries = small_kvae.decode_stream, []

    def small_card(z, *options):
        tries.append(options)
        for i, frames in enumerate(decode_stream(z, *options)):
            if len(tries) == 1 and i == 2:
                raise torch.OutOfMemoryError("small card")
            yield frames

    def show(frames):
        order.append(frames.shape[2])
        shown.append(frames.clone())

    host.on_frames, host.on_progress = show, lambda done, total: order.append("progress")
    with torch.no_grad():
        whole = host.decode(z)
        expected = ["progress", *2 * [17, "progress", 16, "progress", 4, "progress"]]
        assert order == expected
        order.clear(), shown.clear()
        small_kvae.decode_stream = small_card
        STREAMS[way](host, z)
    assert len(tries) == 3 and order == expected
    parts = torch.cat(shown, dim=2).split(whole.shape[2], dim=2)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)


def test_on_frames_gets_no_tiles(host):
    host.on_frames = pytest.fail
    with torch.no_grad():
        host.decode_tiled(torch.randn(1, 16, 2, 8, 8), 5, 5, 1)


def test_wrong_inputs_and_adapters_are_refused(small_kvae, host):
    with pytest.raises(ValueError, match="at least one frame"):
        host.encode(torch.zeros(1, 3, 0, 32, 32))
    with pytest.raises(WeightsError, match="swapped"):
        HostVAE(small_kvae, adapter("kvae_3d_1.0", "hunyuan_video"))
    with pytest.raises(ValueError, match="an image latent"):
        host.decode_output_shape((1, 4, 8, 8))
    assert HostVAE(small_kvae).space.name == "kvae_3d_1.0"


def test_a_missing_adapter_is_reported_before_any_work(small_kvae):
    small_kvae.encode = small_kvae.decode_parts = small_kvae.decode_stream = None
    decoder = HostVAE(small_kvae, adapter("hunyuan_video", "kvae_3d_1.0"))
    encoder = HostVAE(small_kvae, encode_adapter=adapter("kvae_3d_1.0", "hunyuan_video"))
    decoder.planner.budget = encoder.planner.budget = 1  # which a plan would refuse
    for encode in (decoder.encode, decoder.encode_tiled):
        with pytest.raises(WeightsError, match="cannot encode"):
            encode(torch.zeros(1, 3, 1, 32, 32))
    for decode in (encoder.decode, encoder.decode_tiled, lambda z: next(encoder.decode_stream(z))):
        with pytest.raises(WeightsError, match="cannot decode"):
            decode(torch.zeros(1, 16, 1, 4, 4))


WAYS = {
    "decode": lambda host, z: host.decode(z),
    "decode_tiled": lambda host, z: host.decode_tiled(z, 4, 4, 1),
    "decode_stream": lambda host, z: list(host.decode_stream(z)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_nan_in_the_second_clip_is_refused_before_the_first_is_decoded(host, way):
    z, seen = torch.randn(2, 16, 2, 4, 4), []
    z[1, 3, 1, 2, 2] = torch.nan
    host.on_progress = lambda *done: seen.append(done)
    with torch.no_grad(), pytest.raises(ValueError, match="1 of 1024 values of this latent are NaN"):
        WAYS[way](host, z)
    assert seen == []


@pytest.mark.parametrize("way", WAYS)
def test_latents_are_scanned_once_or_not_at_all_if_the_caller_has_checked_them(host, way, monkeypatch):
    scanned, z = [], torch.randn(2, 16, 2, 4, 4)
    monkeypatch.setattr(host_vae, "check_finite", lambda x, what: scanned.append(x))
    with torch.no_grad():
        WAYS[way](host, z)
        assert [x is z for x in scanned] == [True]
        host.latents_checked = True
        WAYS[way](host, z)
    assert len(scanned) == 1


def test_to_image_works_in_place_and_returns():
    x = torch.tensor([-2.0, -1, 0, 1, 2])
    assert to_image(x) is x
    assert x.tolist() == [0, 0, 0.5, 1, 1]


# ---- memory


def test_a_budget_holds_or_is_refused_with_the_least_that_is_needed(small_kvae):
    host, z = HostVAE(small_kvae), torch.randn(1, 16, 3, 12, 12)
    unlimited = host.memory_used_decode(z.shape, torch.float32)
    with torch.no_grad():
        whole = host.decode(z)
        host.planner.budget = 1
        with pytest.raises(BudgetError) as caught:
            host.decode(z)
        host.planner.budget = caught.value.least.peak  # the minimum that the message states is enough
        assert host.memory_used_decode(z.shape, torch.float32) <= host.planner.budget < unlimited
        torch.testing.assert_close(host.decode(z), whole, rtol=0, atol=1e-4)


def test_out_of_memory_continues_with_less_memory_and_loses_no_frame(small_kvae, caplog):
    host, z = HostVAE(small_kvae), torch.randn(1, 16, 10, 8, 8)
    decode_stream, executions, seen = small_kvae.decode_stream, [], []
    host.on_progress = lambda done, total: seen.append((done, total))

    def small_card(z, execution, *progress_and_norms):
        executions.append(present(execution))
        for i, frames in enumerate(decode_stream(z, execution, *progress_and_norms)):
            if len(executions) == 1 and i == 1:
                raise torch.OutOfMemoryError("small card")
            yield frames

    with torch.no_grad():
        whole = host.decode(z)
        with pytest.raises(BudgetError) as caught:
            plan_decode(small_kvae, z.shape, 0, stream=True)
        small_kvae.decode_stream = small_card
        for decode in (host.decode, lambda z: torch.cat(list(host.decode_stream(z)), dim=2)):
            for each in (executions, seen, caplog.records):
                each.clear()
            torch.testing.assert_close(decode(z), whole, rtol=0, atol=1e-4)
            assert seen == [(0, 10), (5, 10), (9, 10), (10, 10)]
            assert executions[1] == caught.value.least.execution
            assert [record.levelname for record in caplog.records] == ["WARNING"]
        small_kvae.decode_stream = lambda *_: exec("raise torch.OutOfMemoryError", {"torch": torch})
        with pytest.raises(torch.OutOfMemoryError):  # for the host, which then uses tiles
            host.decode(z)


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_a_host_left_elsewhere_are_moved_before_it_is_asked_what_is_free(small_kvae, way):
    """To the device of the latents, here the meta device. Otherwise the weights' own bytes would count as free."""
    host, moved = HostVAE(small_kvae), []
    host.latents_checked, host.output_device = True, torch.device("meta")
    host.planner.free_memory = lambda: moved.append(next(host.kvae.parameters()).is_meta)
    with torch.no_grad():
        WAYS[way](host, torch.randn(2, 16, 2, 8, 8, device="meta"))
    assert moved == [True]


def test_frames_beyond_all_memory_are_refused_in_words(host):
    z = torch.zeros(1).expand(1, 16, 100_000, 2000, 2000)
    with pytest.raises(MemoryError, match="1,228,791 GB of frames, 1 x 399997 of 16000x16000"):
        host.decode(z)


def test_blended_tiles_are_used_only_if_asked_for_and_stay_within_the_budget(small_kvae):
    host, z = HostVAE(small_kvae), torch.randn(1, 16, 6, 24, 24)
    with torch.no_grad():
        whole = host.decode(z)
        host.planner.budget = 1
        with pytest.raises(BudgetError) as caught:
            host.decode(z)
        host.planner.budget = caught.value.least.peak * 2 // 3
        with pytest.raises(BudgetError):
            host.decode(z)
        host.planner.approximate = True
        with PeakMemory() as memory:
            x = host.decode(z)
        assert memory.peak - x.nbytes <= host.planner.budget
        assert 0 < (x - whole).norm() < 0.2 * whole.norm()
        with pytest.raises(BudgetError):  # a stream yields whole frames, so it has no tiles
            list(host.decode_stream(z))


# ---- tiles of a host


def test_one_tile_is_the_whole_picture(host):
    z, x = torch.randn(2, 16, 6, 4, 6), torch.rand(2, 3, 22, 32, 48) * 2 - 1
    with torch.no_grad():
        assert torch.equal(host.decode_tiled(z, tile_x=6, tile_y=6, overlap=2), host.decode(z))
        torch.testing.assert_close(host.encode_tiled(x, tile_x=64, tile_y=64, overlap=8), host.encode(x))


def test_a_tile_is_decoded_by_itself_and_through_the_whole_clip(small_kvae):
    host = HostVAE(small_kvae)
    z, seen = torch.randn(1, 16, 6, 4, 8), []
    host.on_progress = lambda done, total: seen.append((done, total))
    with torch.no_grad():
        x = host.decode_tiled(z, tile_x=5, tile_y=4, overlap=2, tile_t=2, overlap_t=1)
        assert seen == [(0, 6), (2, 6), (3, 6), (5, 6), (6, 6)]
        assert x.shape == (1, 3, 21, 32, 64)
        norms = GroupNormStats()
        list(small_kvae.decode_stream(F.interpolate(z, (6, 2, 5), mode="area"), norm_stats=norms))
        for tile in (slice(0, 5), slice(3, 8)):
            parts = list(small_kvae.decode_stream(z[..., tile], norm_stats=norms))
            expected = from_kvae_pixels(torch.cat(parts, dim=2))
            alone = slice(0, 24) if tile.start == 0 else slice(40, 64)  # the part that the other tile does not cover
            torch.testing.assert_close(x[..., alone], expected[..., alone.start - 8 * tile.start :][..., :24])


def test_tiles_share_their_statistics():
    """Bright on one side and dark on the other: with statistics of each half, the halves would look alike."""
    host = HostVAE(load_kvae(TINY["kvae"]))
    x = (torch.linspace(-1, 1, 128).expand(1, 3, 5, 64, 128) + 0.2 * torch.randn(1, 3, 5, 64, 128)).clamp(-1, 1)
    with torch.no_grad():
        z = host.encode(x)
        y = host.decode(z)
        halves = torch.cat([host.decode(half) for half in z.split(8, dim=4)], dim=4)
        assert (host.decode_tiled(z, 10, 8, 4) - y).norm() < 0.7 * (halves - y).norm()
        halves = torch.cat([host.encode(half) for half in x.split(64, dim=4)], dim=4)
        assert (host.encode_tiled(x, 80, 64, 32) - z).norm() < 0.7 * (halves - z).norm()


def test_tiles_cover_the_picture_and_their_weights_add_up_to_one():
    for n, tile, overlap in ((8, 5, 2), (7, 3, 1), (30, 16, 4), (3, 8, 2), (33, 32, 8)):
        axis = blended_tiling(n, n, (tile_count(n, tile, overlap), 1), overlap).rows
        total = torch.zeros(2 * n)
        for (lo, hi), weights in zip(axis.outer, axis.blend_weights(2), strict=True):
            assert hi - lo <= min(n, tile)
            assert weights.min() > 0
            total[2 * lo : 2 * hi] += weights
        torch.testing.assert_close(total, torch.ones(2 * n))
        assert all(one[1] - two[0] >= overlap for one, two in pairwise(axis.outer))
    with pytest.raises(ValueError, match="tiles of 4 latents that overlap by 4"):
        tile_count(8, 4, 4)


def test_a_host_is_asked_for_the_frames_that_wait_on_a_card(small_kvae):
    """While its weights are still elsewhere. One segment of float32 frames waits there while the next is computed."""
    host, shape = HostVAE(small_kvae), (1, 16, 9, 8, 8)
    host.planner.device = torch.device("cuda")
    without = host.planner.memory(plan_decode, shape, torch.float32)
    assert host.memory_used_decode(shape, torch.float32) == without + 17 * 3 * 64 * 64 * 4
    host.pin_memory = False
    assert host.memory_used_decode(shape, torch.float32) == without
