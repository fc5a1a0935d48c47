"""PipelineVAE answers what diffusers, musubi-tuner and Kandinsky's code ask of a VAE, with the results of HostVAE."""

import pytest
import torch

import needs
from kvae_comfyui.adapters import HybridVAE, LatentAdapter, latent_space, load_adapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.kvae import BudgetError, load_kvae
from kvae_comfyui.serving import planning
from kvae_comfyui.serving.pipeline_vae import PipelineVAE
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS
from small_models import small


def adapter(source: str, target: str) -> LatentAdapter:
    source, target = latent_space(source), latent_space(target)
    return LatentAdapter(Affine(source.channels, target.channels), source, target).requires_grad_(False)


def tiny() -> HybridVAE:
    return HybridVAE(load_kvae(TINY["kvae"]), load_adapter(TINY_ADAPTERS["h2k"]), load_adapter(TINY_ADAPTERS["k2h"]))


def newer() -> HybridVAE:
    """For HunyuanVideo 1.5, with untrained adapters."""
    spaces = "hunyuan_video_1.5", "kvae_3d_2.0_t4s16"
    return HybridVAE(small("2.0-t4s16"), adapter(*spaces), adapter(*spaces[::-1]))


@pytest.fixture
def vae():
    return PipelineVAE.of(tiny())


def pixels(frames: int, side: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, frames, side, side) * 2 - 1


# space, channels, pixels of a latent, scaling factor
SPACES = {
    "hunyuan_video": (tiny, 16, 8, 0.476986),
    "hunyuan_video_1.5": (newer, 32, 16, 1.03682),
    "kvae_3d_1.0": (lambda: HybridVAE(small("1.0")), 16, 8, 1.0),
    "kvae_3d_2.0_t4s8": (lambda: HybridVAE(small("2.0-t4s8")), 16, 8, 1.0),
    "kvae_3d_2.0_t4s16": (lambda: HybridVAE(small("2.0-t4s16")), 64, 16, 0.910344004631042),
}


@pytest.mark.parametrize("space", SPACES)
def test_every_space_is_served(space):
    make, channels, side, factor = SPACES[space]
    vae = PipelineVAE.of(make())
    assert vae.host.space.name == space
    assert (vae.config.scaling_factor, vae.config.latent_channels) == (factor, channels)
    assert (vae.config.temporal_compression_ratio, vae.config.spatial_compression_ratio) == (4, side)
    assert (vae.scaling_factor, vae.temporal_compression_ratio, vae.spatial_compression_ratio) == (factor, 4, side)
    assert not hasattr(vae.config, "shift_factor")
    x = pixels(9, 2 * side)
    with torch.no_grad():
        z = vae.encode(x)[0].mode()
        assert z.shape == (1, channels, 3, 2, 2)
        assert torch.equal(z, vae.host.encode(x))
        frames = vae.decode(z)[0]
        assert frames.shape == x.shape
        assert torch.equal(frames, vae.host.decode(z))


def test_results_are_tuples_with_names(vae):
    x, generator = pixels(5), torch.Generator()
    state = generator.get_state()
    for encoded in (vae.encode(x), vae.encode(x, return_dict=False), vae.encode(x, opt_tiling=False)):
        assert isinstance(encoded, tuple) and len(encoded) == 1
        assert encoded[0] is encoded.latent_dist
        z = encoded.latent_dist.mode()
        assert torch.equal(encoded.latent_dist.sample(), z)
        assert torch.equal(encoded.latent_dist.sample(generator), z)
        assert torch.equal(encoded.latent_dist.sample(generator=generator), z)
    assert torch.equal(generator.get_state(), state)  # so that the pipeline draws what it would draw
    for decoded in (vae.decode(z), vae.decode(z, return_dict=False), vae.decode(z, generator=generator)):
        assert isinstance(decoded, tuple) and len(decoded) == 1
        assert decoded[0] is decoded.sample


def test_config_can_be_set_and_extended(vae):
    vae.config.scaling_factor, vae.config.nabla_force_resize = 0.5, True
    assert (vae.config.scaling_factor, vae.config.nabla_force_resize) == (0.5, True)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 256, 32  # as musubi-tuner does


NAMES = [
    *(f"{verb}_{what}" for verb in ("enable", "disable") for what in ("tiling", "slicing")),
    *("enable_spatial_tiling", "apply_tiling", "set_chunk_size_for_causal_conv_3d"),
]


def test_tiling_has_no_effect(vae):
    z = torch.randn(1, 16, 2, 4, 4)
    whole = vae.decode(z).sample
    for name in NAMES:
        call = getattr(vae, name)
        call(), call(True), call((1, 17, 256, 256), (8, 192, 192)), call(tile_sample_min_height=64)
    assert torch.equal(vae.decode(z).sample, whole)


# ---- frames


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (16, 4), (17, 5), (18, 5), (20, 5), (21, 6), (121, 31)])
def test_frames_beyond_4n_plus_1_are_dropped(vae, frames, latents):
    x = pixels(frames, 16)
    z = vae.encode(x).latent_dist.sample()
    assert z.shape == (1, 16, latents, 2, 2)
    kept = 4 * (latents - 1) + 1
    assert torch.equal(z, vae.encode(x[:, :, :kept]).latent_dist.sample())
    assert vae.decode(z).sample.shape == (1, 3, kept, 16, 16)


# in 2.0 at every length, since its norms see one position; in 1.0 at the ends of segments, which it normalises
@pytest.mark.parametrize(("make", "lengths"), [(tiny, (17, 33)), (newer, (1, 5, 13, 17, 29))])
def test_a_prefix_of_a_clip_has_a_prefix_of_its_latents(make, lengths):
    vae, x = PipelineVAE.of(make()), pixels(41)
    whole = vae.encode(x).latent_dist.mode()
    for frames in lengths:
        z = vae.encode(x[:, :, :frames]).latent_dist.mode()
        torch.testing.assert_close(z, whole[:, :, : z.shape[2]], rtol=0, atol=1e-4)


# ---- dtype, device, memory


def test_results_have_the_dtype_of_the_input_and_are_contiguous(vae):
    z32 = vae.encode(pixels(5)).latent_dist.mode()
    for weights in (torch.float32, torch.bfloat16):
        assert vae.to(weights) is vae
        assert vae.dtype is weights
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            z = vae.encode(pixels(5).to(dtype)).latent_dist.mode()
            assert (z.dtype, z.is_contiguous()) == (dtype, True)
            x = vae.decode(z32.to(dtype)).sample
            assert (x.dtype, x.is_contiguous()) == (dtype, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it_changes_nothing(vae, dtype):
    x, z = pixels(5), torch.randn(1, 16, 2, 4, 4)
    encoded, decoded = vae.encode(x)[0].mode(), vae.decode(z)[0]
    with torch.autocast("cpu", dtype):
        assert torch.equal(vae.encode(x)[0].mode(), encoded)
        assert torch.equal(vae.decode(z)[0], decoded)
        assert torch.is_autocast_enabled("cpu")


def test_it_is_a_module_whose_methods_return_it(vae):
    assert isinstance(vae, torch.nn.Module)
    for same in (vae.to("cpu"), vae.to(device="cpu", dtype=torch.float32), vae.to("cpu", non_blocking=True)):
        assert same is vae
    assert vae.eval() is vae and vae.requires_grad_(False) is vae
    assert vae.device == torch.device("cpu")
    assert vae.to("meta").device == torch.device("meta")


def test_float16_leaves_the_precision(vae, caplog):
    """KVAE is not made for it, and musubi-tuner and diffusers ask for it readily."""
    for ask in (lambda: vae.to(torch.float16), lambda: vae.to("cpu", torch.float16), vae.half):
        caplog.clear()
        assert ask() is vae and vae.dtype is torch.float32
        assert caplog.messages == ["KVAE is not made for float16; it stays in float32"]
    assert vae.to(torch.bfloat16).dtype is torch.bfloat16


def test_float16_leaves_adapters_in_float32():
    hybrid = tiny()
    hybrid.kvae.bfloat16()
    vae = PipelineVAE.of(hybrid).half()
    assert vae.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in hybrid.decode_adapter.parameters()} == {torch.float32}


def test_it_computes_no_gradients(vae):
    z = torch.randn(1, 16, 2, 4, 4, requires_grad=True)
    assert not vae.requires_grad_(True).decode(z).sample.requires_grad
    assert not vae.encode(pixels(5).requires_grad_()).latent_dist.mode().requires_grad


class Hook:
    """A hook as of accelerate: brings the weights of a module to where they are needed."""

    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **options):
        self.calls.append(module)


def test_the_hook_of_an_offload_is_called_before_each_use(vae):
    hook = vae._hf_hook = Hook()
    vae.decode(vae.encode(pixels(5)).latent_dist.mode())
    assert hook.calls == [vae, vae]


def test_model_cpu_offload_of_accelerate(vae):
    accelerate = needs.package("accelerate", "requirements-training.txt")
    z = torch.randn(1, 16, 2, 4, 4)
    frames = vae.decode(z).sample
    _, hook = accelerate.cpu_offload_with_hook(vae, "cpu")
    assert torch.equal(vae.decode(z).sample, frames)
    hook.offload()
    assert vae.device == torch.device("cpu")
    hook.remove()


def test_an_offload_layer_by_layer_is_refused_in_words(vae):
    accelerate = needs.package("accelerate", "requirements-training.txt")
    accelerate.cpu_offload(vae, "cpu")
    with pytest.raises(RuntimeError, match="use enable_model_cpu_offload in place of enable_sequential_cpu_offload"):
        vae.decode(torch.randn(1, 16, 2, 4, 4))


def test_a_budget_holds():
    z = torch.randn(1, 16, 1, 16, 16)
    with pytest.raises(BudgetError) as refused:
        PipelineVAE.of(tiny(), memory_gb=0.001).decode(z)
    PipelineVAE.of(tiny(), memory_gb=refused.value.least.peak / 1e9).decode(z)


def test_free_memory_is_asked_for_where_the_weights_are_now(vae, monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "free_memory", asked.append)
    vae.decode(torch.randn(1, 16, 2, 4, 4))
    vae.to("meta").host.planner.free_memory()
    assert asked == [torch.device("cpu"), torch.device("meta")]


def test_progress_is_that_of_the_host(vae):
    seen = []
    vae.host.on_progress = lambda done, total: seen.append((done, total))
    vae.decode(torch.randn(1, 16, 7, 4, 4))
    assert seen == [(0, 7), (5, 7), (7, 7)]


@needs.gpu
def test_weights_that_stay_on_a_gpu_compute_what_comes_from_elsewhere(vae):
    """Otherwise latents on the CPU would bring the weights there, where a decode lasts hours."""
    z = torch.randn(1, 16, 2, 4, 4)
    frames = vae.decode(z).sample
    x = vae.to("cuda").decode(z).sample
    assert (x.device.type, vae.device.type) == ("cpu", "cuda")
    torch.testing.assert_close(x, frames, rtol=0, atol=1e-2)
    assert vae.decode(z.cuda()).sample.device.type == "cuda"
    assert vae.encode(pixels(5)).latent_dist.mode().device.type == "cpu"
