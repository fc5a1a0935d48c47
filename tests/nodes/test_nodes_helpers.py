"""What the nodes are made of, without ComfyUI."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from conftest import ROOT
from kvae_comfyui.adapters import HybridVAE, LatentAdapter, space
from kvae_comfyui.adapters.files import direction_of, save_adapter
from kvae_comfyui.adapters.hybrid import from_kvae_pixels
from kvae_comfyui.adapters.inspect import check_latent, describe, what_latent
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import KVAE, BudgetError, GroupNormStats, WeightsError, load_kvae, plan_decode
from kvae_comfyui.kvae.engine.tiles import blended_tiling
from kvae_comfyui.serving.clips import cut_stream, kept_frames, to_clip
from kvae_comfyui.serving.metrics import difference, figures, ssim, table
from kvae_comfyui.serving.sample_clip import sample_clip
from kvae_comfyui.serving.serve import ServedVAE, to_image
from kvae_comfyui.serving.tiled import TiledVAE, tile_count
from kvae_comfyui.training.vaes import TINY


def adapter(source: str, target: str) -> LatentAdapter:
    return LatentAdapter(Affine(16, 16), space(source), space(target)).requires_grad_(False)


@pytest.fixture
def served(small_kvae):
    return ServedVAE(small_kvae, adapter("hunyuan_video", "kvae_3d_1.0"), adapter("kvae_3d_1.0", "hunyuan_video"))


# ---- the pack as a package


def test_the_pack_imports_without_comfyui_and_without_torch():
    code = "import importlib.util, sys\n" + (
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and module.WEB_DIRECTORY"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_comfyui_is_said_when_the_nodes_are_asked_for():
    code = "import asyncio, importlib.util, sys\n" + (
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "sys.modules['pack'] = module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "asyncio.run(module.comfy_entrypoint())"
    )
    # of its own, since the tests of the nodes put a ComfyUI on the path of theirs
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError: No module named 'comfy" in out.stderr


# ---- ServedVAE


def test_served_is_hybrid_bit_for_bit_and_reports_each_segment(served):
    seen = []
    served.on_progress = lambda done, total: seen.append((done, total))
    z = torch.randn(1, 16, 7, 4, 4)
    hybrid = HybridVAE(served.kvae, served.vae.decode_adapter, served.vae.encode_adapter)
    with torch.no_grad():
        assert torch.equal(served.decode(z), hybrid.decode(z))
        assert seen == [(5, 7), (7, 7)]
        buffer = torch.empty(served.decode_output_shape(z.shape))
        assert served.decode(z, output_buffer=buffer) is buffer
        assert torch.equal(torch.cat(list(served.decode_stream(z)), dim=2), buffer)
        seen.clear()
        x = torch.rand(1, 3, 23, 32, 32) * 2 - 1
        assert torch.equal(served.encode(x, device=torch.device("cpu")), hybrid.encode(x[:, :, :21]))
        assert seen == [(5, 6), (6, 6)]


def test_served_in_bfloat16_keeps_its_adapters_in_float32(small_kvae):
    to_kvae = adapter("hunyuan_video", "kvae_3d_1.0")
    served = ServedVAE(small_kvae.bfloat16(), to_kvae)
    z = torch.randn(2, 16, 2, 4, 4)
    with torch.no_grad():
        x = served.decode(z)
    assert x.dtype == torch.float32
    assert to_kvae.network.affine.conv.weight.dtype == torch.float32


def test_what_on_progress_raises_stops_the_work(served):
    def cancel(done, total):
        raise KeyboardInterrupt

    served.on_progress = cancel
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        served.decode(torch.randn(1, 16, 7, 4, 4))


def test_served_refuses_what_it_cannot_take(small_kvae, served):
    with pytest.raises(ValueError, match="at least one frame"):
        served.encode(torch.zeros(1, 3, 0, 32, 32))
    with pytest.raises(WeightsError, match="cannot encode"):
        ServedVAE(small_kvae, adapter("hunyuan_video", "kvae_3d_1.0")).encode(torch.zeros(1, 3, 1, 32, 32))
    with pytest.raises(WeightsError, match="swapped"):
        ServedVAE(small_kvae, adapter("kvae_3d_1.0", "hunyuan_video"))
    with pytest.raises(ValueError, match="an image latent"):
        served.decode_output_shape((1, 4, 8, 8))
    assert ServedVAE(small_kvae).space.name == "kvae_3d_1.0"


def test_to_image_works_in_place_and_returns():
    x = torch.tensor([-2.0, -1, 0, 1, 2])
    assert to_image(x) is x
    assert x.tolist() == [0, 0, 0.5, 1, 1]


def test_memory_is_told_and_kept_to():
    shape, bf16 = (1, 16, 9, 90, 160), torch.bfloat16
    with torch.device("meta"):
        real = ServedVAE(KVAE().to(bf16))
    assert 15e9 < real.memory_used_decode(shape, bf16) < 25e9
    assert real.memory_used_decode((1, 16, 65, 90, 160), bf16) < 1.3 * real.memory_used_decode(shape, bf16)
    assert 10e9 < real.memory_used_encode((1, 3, 33, 720, 1280), bf16) < 15e9
    asked = []

    def decode_stream(z, execution):
        asked.append(execution)
        return iter(())

    real.vae.decode_stream = decode_stream
    for free in (None, 12 << 30, 1):
        real.free_memory = lambda free=free: free
        list(real._decode_clip(torch.empty(shape, device="meta"), lambda t: None))
    assert [execution.recompute for execution in asked] == [0, 2, 3]


def test_a_budget_is_kept_to_or_refused_in_its_own_words(small_kvae):
    served, z = ServedVAE(small_kvae), torch.randn(1, 16, 3, 12, 12)
    free = served.memory_used_decode(z.shape, torch.float32)
    with torch.no_grad():
        whole = served.decode(z)
        served.budget = 1
        with pytest.raises(BudgetError, match="this clip needs at least .*, but the budget is 0.00 GB") as caught:
            served.decode(z)
        served.budget = caught.value.least.peak  # what the message offers is enough
        assert served.memory_used_decode(z.shape, torch.float32) <= served.budget < free
        torch.testing.assert_close(served.decode(z), whole, rtol=0, atol=1e-4)


def test_out_of_memory_goes_on_with_less_and_loses_nothing(small_kvae, caplog):
    served, z = ServedVAE(small_kvae), torch.randn(1, 16, 10, 4, 4)
    decode_stream, executions, seen = small_kvae.decode_stream, [], []
    served.on_progress = lambda done, total: seen.append((done, total))

    def small_card(z, execution, *progress_and_norms):
        executions.append(execution)
        for i, frames in enumerate(decode_stream(z, execution, *progress_and_norms)):
            if len(executions) == 1 and i == 1:
                raise torch.OutOfMemoryError("small card")
            yield frames

    with torch.no_grad():
        whole = served.decode(z)
        with pytest.raises(BudgetError) as caught:
            plan_decode(small_kvae, z.shape, 0, stream=True)
        small_kvae.decode_stream = small_card
        for decode in (served.decode, lambda z: torch.cat(list(served.decode_stream(z)), dim=2)):
            for each in (executions, seen, caplog.records):
                each.clear()
            torch.testing.assert_close(decode(z), whole, rtol=0, atol=1e-4)
            assert seen == [(5, 10), (9, 10), (10, 10)]
            assert executions[1] == caught.value.least.execution
            assert [record.levelname for record in caplog.records] == ["WARNING"]
        small_kvae.decode_stream = lambda *_: exec("raise torch.OutOfMemoryError", {"torch": torch})
        with pytest.raises(torch.OutOfMemoryError):  # for the host, which goes on with tiles
            served.decode(z)


def test_frames_beyond_all_memory_are_refused_in_words(served):
    z = torch.zeros(1).expand(1, 16, 100_000, 2000, 2000)
    with pytest.raises(MemoryError, match="1,228,791 GB of frames, 1 x 399997 of 16000x16000"):
        served.decode(z)


# ---- tiles of a host


def test_one_tile_is_the_whole_picture(small_kvae):
    tiled = TiledVAE(small_kvae, adapter("hunyuan_video", "kvae_3d_1.0"), adapter("kvae_3d_1.0", "hunyuan_video"))
    z, x = torch.randn(2, 16, 6, 4, 6), torch.rand(2, 3, 22, 32, 48) * 2 - 1
    with torch.no_grad():
        assert torch.equal(tiled.decode_tiled(z, tile_x=6, tile_y=6, overlap=2), tiled.decode(z))
        torch.testing.assert_close(tiled.encode_tiled(x, tile_x=64, tile_y=64, overlap=8), tiled.encode(x))


def test_a_tile_alone_is_itself_and_time_is_not_cut(small_kvae):
    tiled = TiledVAE(small_kvae)
    z, seen = torch.randn(1, 16, 6, 4, 8), []
    tiled.on_progress = lambda done, total: seen.append((done, total))
    with torch.no_grad():
        x = tiled.decode_tiled(z, tile_x=5, tile_y=4, overlap=2, tile_t=2, overlap_t=1)
        assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]
        assert x.shape == (1, 3, 21, 32, 64)
        norms = GroupNormStats()
        list(small_kvae.decode_stream(F.interpolate(z, (6, 2, 5), mode="area"), norm_stats=norms))
        for tile in (slice(0, 5), slice(3, 8)):
            parts = list(small_kvae.decode_stream(z[..., tile], norm_stats=norms))
            expected = from_kvae_pixels(torch.cat(parts, dim=2))
            alone = slice(0, 24) if tile.start == 0 else slice(40, 64)  # what no other tile covers
            torch.testing.assert_close(x[..., alone], expected[..., alone.start - 8 * tile.start :][..., :24])


def test_tiles_share_their_statistics():
    """Bright on one side and dark on the other: statistics of their own would make the two halves alike."""
    tiled = TiledVAE(load_kvae(TINY["kvae"]))
    x = (torch.linspace(-1, 1, 128).expand(1, 3, 5, 64, 128) + 0.2 * torch.randn(1, 3, 5, 64, 128)).clamp(-1, 1)
    with torch.no_grad():
        z = tiled.encode(x)
        y = tiled.decode(z)
        halves = torch.cat([tiled.decode(half) for half in z.split(8, dim=4)], dim=4)
        assert (tiled.decode_tiled(z, 10, 8, 4) - y).norm() < 0.7 * (halves - y).norm()
        halves = torch.cat([tiled.encode(half) for half in x.split(64, dim=4)], dim=4)
        assert (tiled.encode_tiled(x, 80, 64, 32) - z).norm() < 0.7 * (halves - z).norm()


def test_tiles_cover_and_their_weights_are_one():
    for n, tile, overlap in ((8, 5, 2), (7, 3, 1), (30, 16, 4), (3, 8, 2), (33, 32, 8)):
        axis = blended_tiling(n, n, (tile_count(n, tile, overlap), 1), overlap).rows
        total = torch.zeros(2 * n)
        for (lo, hi), weights in zip(axis.outer, axis.blend_weights(2), strict=True):
            assert hi - lo <= min(n, tile)
            assert weights.min() > 0
            total[2 * lo : 2 * hi] += weights
        torch.testing.assert_close(total, torch.ones(2 * n))
        assert all(one[1] - two[0] >= overlap for one, two in pairwise(axis.outer))
    with pytest.raises(ValueError, match="tiles of 4 latents with 4 in common"):
        tile_count(8, 4, 4)


def test_where_nothing_exact_fits_an_approximation_is_asked_for(small_kvae):
    """Blended tiles take what the budget says, and give nearly what is exact."""
    served, z = ServedVAE(small_kvae), torch.randn(1, 16, 6, 24, 24)
    with torch.no_grad():
        whole = served.decode(z)
        served.budget = 1
        with pytest.raises(BudgetError) as caught:
            served.decode(z)
        served.budget = caught.value.least.peak * 2 // 3
        with pytest.raises(BudgetError):
            served.decode(z)
        served.approximate = True
        with PeakMemory() as memory:
            x = served.decode(z)
        assert memory.peak - x.nbytes <= served.budget
        assert 0 < (x - whole).norm() < 0.2 * whole.norm()
        with pytest.raises(BudgetError):  # frames that must come whole, segment by segment
            list(served.decode_stream(z))


def test_the_preferred_tile_fits_half_of_what_is_free():
    with torch.device("meta"):
        real = TiledVAE(KVAE().to(torch.bfloat16))
    sides = [real.preferred_decode_tile(gb * 1e9, torch.bfloat16) for gb in (0.01, 8, 24)]
    assert sides[0] == 0 < sides[1] < sides[2]
    assert real.memory_used_decode((1, 16, 9, sides[2], sides[2]), torch.bfloat16) <= 12e9


# ---- latents


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 8, 8), "an image latent"),
        ((1, 8), "not a latent"),
        ((1, 16, 2, 4, 4), "hunyuan_video or kvae_3d_1.0"),
        ((1, 32, 2, 4, 4), "hunyuan_video_1.5"),
        ((1, 48, 2, 4, 4), "Wan 2.2"),
        ((1, 7, 2, 4, 4), "7 channels, which no space here has"),
    ],
)
def test_a_latent_is_called_by_its_name(shape, words):
    assert words in what_latent(shape)
    if shape[1] != 16:
        with pytest.raises(ValueError, match="expected a hunyuan_video latent"):
            check_latent(torch.zeros(shape), space("hunyuan_video"))


def test_describe_tells_raw_from_scaled_and_counts_nan():
    z = torch.randn(1, 16, 3, 8, 8)
    assert "it looks scaled" in describe(z)
    assert "it looks raw" in describe(z / 0.476986)
    assert "known for sure" in describe(z, "kvae_3d_1.0")
    assert "not sampled yet" in describe(torch.zeros(1, 16, 3, 8, 8))
    z[0, 0, 0, 0, 0] = float("inf")
    assert "1 of 3072 values are NaN or infinite" in describe(z)
    assert "no finite value" in describe(torch.full((1, 16, 1, 1, 1), float("nan")))
    with pytest.raises(ValueError, match="1 of 3072 values"):
        check_latent(z, space("hunyuan_video"))


def test_the_direction_of_an_adapter_is_read_from_its_header(tmp_path):
    save_adapter(tmp_path / "x.safetensors", adapter("hunyuan_video", "kvae_3d_1.0"))
    assert direction_of(tmp_path / "x.safetensors") == ("hunyuan_video", "kvae_3d_1.0")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert direction_of(tmp_path / "y.safetensors") is None
    assert adapter("hunyuan_video", "kvae_3d_1.0").about() == "hunyuan_video → kvae_3d_1.0, Affine, 6,928 weights"


# ---- frames and figures


def test_frames_are_padded_and_cut():
    clip = sample_clip(6, 8, 8)
    padded = to_clip(clip, 4)
    assert len(padded) == 9
    assert torch.equal(padded[6:], clip[-1:].expand(3, -1, -1, -1))
    assert to_clip(clip[:5], 4) is not None and len(to_clip(clip[:5], 4)) == 5
    assert kept_frames(9, 6) == 6
    assert kept_frames(9, None) == kept_frames(9, 20) == 9
    two = torch.arange(18)  # two clips of nine, in segments of 5 and 4
    segments = cut_stream(two.split([5, 4, 5, 4]), decoded=9, kept=6)
    assert torch.cat(list(segments)).tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14]


def test_figures_of_known_errors():
    x = sample_clip(4, 32, 48) * 0.5 + 0.2
    shifted = figures(x + 0.1, x)
    assert shifted["psnr"] == pytest.approx(20, abs=1e-3)
    assert shifted["red"] == pytest.approx(25.5, abs=1e-3)
    assert shifted["flicker"] == pytest.approx(0, abs=1e-3)
    assert figures(x, x)["ssim"] == pytest.approx(1)
    sign = torch.tensor([1.0, -1, 1, -1])[:, None, None, None]
    assert figures(x + 0.1 * sign, x)["flicker"] == pytest.approx(51, abs=1e-3)
    assert torch.equal(difference(x, x), torch.full_like(x, 0.5))
    with pytest.raises(ValueError, match="expected two of one shape"):
        figures(x[:1], x)
    text = table({"A": shifted | {"decode": 1.5}, "B": {"decode": 2.0}})
    assert text.splitlines()[0].split() == ["PSNR", "dB", "SSIM", "flicker", "red", "green", "blue", "decode", "s"]
    assert text.splitlines()[2].split() == ["B", "2.00"]


def test_ssim_is_that_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    x = sample_clip(1, 40, 50)[0]
    y = (x + 0.05 * torch.randn(40, 50, 3)).clamp(0, 1)
    theirs = torchmetrics.structural_similarity_index_measure(
        y.permute(2, 0, 1)[None], x.permute(2, 0, 1)[None], data_range=1.0
    )
    assert ssim(y, x).item() == pytest.approx(theirs.item(), abs=0.02)  # theirs pads the edges
