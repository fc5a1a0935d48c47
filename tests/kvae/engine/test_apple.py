"""On a stand-in for Apple's GPU, every way to compute a KVAE gives a CPU's result, with what that GPU can do."""

import copy

import pytest
import torch
import torch.nn.functional as F

from apple_gpu import AppleGPU, NotOnApple
from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import BudgetError, Execution, GroupNormStats, Recompute, plan_decode, plan_encode
from kvae_comfyui.kvae.engine.tiles import means
from small_models import SMALL, VERSION_TWO, assert_same, clip, joined, latent, small

EXECUTIONS = {
    "whole": Execution(),
    "by strips": Execution(strip_bytes=1 << 16, recompute=Recompute.FULL_RESOLUTION),
    "blended": Execution(tiles=(2, 2), overlap=1),
}
TOLERANCE = 1e-4  # GroupNorm of so few values enlarges rounding


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
def test_the_result_is_a_cpus(name, execution):
    kvae = small(name)
    x, z = clip(kvae, 21), latent(kvae, 6).contiguous(memory_format=torch.channels_last_3d)
    latents, frames = kvae.encode(x, execution), kvae.decode(z, execution)
    with torch.no_grad(), AppleGPU():
        on_apple = copy.deepcopy(kvae).to("mps")
        y = on_apple.encode(x.to("mps"), execution)
        assert y.device.type == "mps"
        assert_same(y.cpu(), latents, TOLERANCE)
        assert_same(on_apple.decode(z.to("mps"), execution).cpu(), frames, TOLERANCE)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_streams_and_shared_statistics(name):
    kvae = small(name).bfloat16()
    x, z = clip(kvae, 5).bfloat16(), latent(kvae, 6).bfloat16()
    with torch.no_grad(), AppleGPU():
        on_apple = copy.deepcopy(kvae).to("mps")
        stats = GroupNormStats()
        for _ in range(2):  # recorded, then reused
            y = joined(on_apple.decode_stream(z.to("mps"), norm_stats=stats)).cpu()
            assert_same(y.float(), kvae.decode(z).float(), 0.03)
        assert_same(on_apple.posterior(x.to("mps")).mean.cpu().float(), kvae.encode(x).float(), 0.03)


@pytest.mark.parametrize("name", VERSION_TWO)
def test_exact_tiles(name):
    kvae = small(name)
    z = latent(kvae, 2, 3, 4)
    with torch.no_grad(), AppleGPU():
        tiled = copy.deepcopy(kvae).to("mps").decode(z.to("mps"), Execution(tiles=(1, 2)))
        assert_same(tiled.cpu(), kvae.decode(z))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 0], ids=["fastest", "least"])
def test_a_plan_is_not_below_the_memory_in_use(name, dtype, budget):
    kvae = small(name).to(dtype)
    mps = torch.device("mps")
    for source, plan in ((latent(kvae, 6, 4, 6), plan_decode), (clip(kvae, 21, 4, 6), plan_encode)):
        try:
            found = plan(kvae, source.shape, budget, stream=True, device=mps)
        except BudgetError as error:
            found = error.least
        with AppleGPU():
            on_apple, x = copy.deepcopy(kvae).to("mps"), source.to("mps", dtype)
        stream = on_apple.decode_stream if plan is plan_decode else on_apple.encode_stream
        with torch.no_grad(), PeakMemory() as memory, AppleGPU():
            for _ in stream(x, found.execution):
                pass
        assert memory.peak <= found.peak


@pytest.mark.parametrize("name", SMALL)
def test_gradients(name):
    kvae = small(name).requires_grad_(True)
    x = clip(kvae, 5)
    kvae.posterior(x).sample(torch.Generator().manual_seed(0)).square().mean().backward()
    with AppleGPU():
        on_apple = copy.deepcopy(kvae).to("mps")
        on_apple.zero_grad()
        posterior = on_apple.posterior(x.to("mps"))
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0)).to("mps")
        z = posterior.mean + noise * (0.5 * posterior.logvar.clamp(-30, 20)).exp()
        z.square().mean().backward()
        weight = on_apple.encoder.conv_in.conv.weight
        assert_same(weight.grad.cpu(), kvae.encoder.conv_in.conv.weight.grad, 1e-4)


@pytest.mark.parametrize(("n", "count"), [(9, 9), (9, 4), (90, 31), (7, 1)], ids=str)
def test_means_are_those_of_area_interpolation(n, count):
    x = torch.randn(2, 3, n)
    expected = F.interpolate(x, count, mode="area")
    torch.testing.assert_close(x @ means(n, count, x.device, x.dtype).T, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: x.double(), "float64"),
        (lambda x: F.interpolate(x, (2, 2, 2), mode="area"), "no kernel"),
        (lambda x: x + torch.ones(5), "on the CPU"),
        (lambda x: torch.ones(5).to(x.device, non_blocking=True), "does not wait"),
        (lambda x: F.silu(x[..., :3], inplace=True), "writes to"),
        (lambda x: torch.mul(x, 2, out=x[..., :5].permute(0, 1, 4, 3, 2)), "writes to"),
        (lambda x: F.conv3d(x.contiguous(memory_format=torch.channels_last_3d), x[:, :, :1, :1, :1]), "strides"),
        (lambda x: F.conv2d(x[:, :, 0], x[:, :, 1, :2, :2]), "strides"),
    ],
)
def test_the_stand_in_refuses_what_an_apple_gpu_lacks(what, message):
    with AppleGPU(), pytest.raises(NotOnApple, match=message):
        what(torch.randn(2, 2, 5, 5, 5, device="mps"))
