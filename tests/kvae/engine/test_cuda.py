"""On a GPU: results as on a CPU and as in diffusers, plans that hold, no leak, and no waiting for the device."""

import copy
from functools import partial

import pytest
import torch

import needs
import plain_kvae
from kvae_comfyui.benchmarks.frontier import frontier
from kvae_comfyui.benchmarks.gpu.measure import cost_of
from kvae_comfyui.benchmarks.gpu.models import diffusers_twin, random_kvae, run_of, source_of
from kvae_comfyui.benchmarks.gpu.peaks import allowance
from kvae_comfyui.benchmarks.kvae import exhaust
from kvae_comfyui.kvae import Execution, KVAEConfig, Recompute, plan_decode, plan_encode
from kvae_comfyui.serving.host_vae import HostVAE
from small_models import SMALL, assert_same, clip, joined, latent, small

pytestmark = needs.gpu

CUDA = torch.device("cuda")
EXECUTIONS = [Execution(), Execution(strip_bytes=1 << 14, recompute=Recompute.INNER)]
# cuDNN stays on; by default, this context turns it off
EXACT = {"enabled": True, "allow_tf32": False}
WIDTHS = (64, 128, 128, 256)  # wide enough that a convolution's workspace is small beside its maps
MODELS = {
    "1.0": KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1),
    "2.0": KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1, norm="rms", downsample_version=2),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("execution", EXECUTIONS, ids=["whole", "by strips"])
def test_float32_without_tf32_equals_the_cpu(name, execution):
    kvae = small(name)
    x, z = clip(kvae, 21), latent(kvae, 6)
    on_gpu = copy.deepcopy(kvae).cuda()
    with torch.no_grad(), torch.backends.cudnn.flags(**EXACT):
        assert_same(on_gpu.encode(x.cuda(), execution).cpu(), kvae.encode(x), 2e-5)
        assert_same(on_gpu.decode(z.cuda(), execution).cpu(), kvae.decode(z), 2e-5)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_float32_without_tf32_equals_an_independent_implementation(name, direction):
    """That of diffusers on the same GPU; for the 2.0-t4s8, which diffusers lacks, the plain one of these tests."""
    kvae = small(name).cuda()
    source = (latent(kvae, 8, 4, 6) if direction == "decode" else clip(kvae, 29, 4, 6)).cuda()
    twin = diffusers_twin(kvae)
    with torch.no_grad(), torch.backends.cudnn.flags(**EXACT):
        if twin:
            expected = run_of(twin, direction, source)()
        else:
            expected = getattr(plain_kvae, direction)(kvae.state_dict(), kvae.config, source)
            expected = expected if direction == "decode" else expected.chunk(2, dim=1)[0]
        for execution in EXECUTIONS:
            assert_same(run_of(kvae, direction, source, execution)(), expected, 2e-5)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_the_memory_format_of_the_input_changes_nothing(name, dtype, tolerance):
    kvae = small(name).to("cuda", dtype)
    x, z = (each.to("cuda", dtype) for each in (clip(kvae, 21), latent(kvae, 6)))
    with torch.no_grad(), torch.backends.cudnn.flags(**EXACT):
        for run, source in ((kvae.encode, x), (kvae.decode, z)):
            expected = run(source)
            for other in (
                source.contiguous(memory_format=torch.channels_last_3d),
                source.transpose(3, 4).contiguous().transpose(3, 4),
            ):
                assert_same(run(other).float(), expected.float(), tolerance)


@pytest.mark.parametrize("name", SMALL)
def test_all_executions_give_the_same_in_bfloat16(name):
    """Up to the rounding of bfloat16, which depends on the convolution algorithm."""
    kvae = small(name).to("cuda", torch.bfloat16)
    z = latent(kvae, 6, 8, 8).to("cuda", torch.bfloat16)
    with torch.no_grad():
        whole = kvae.decode(z).float()
        for level in (Recompute.UPSAMPLED, Recompute.INNER):
            found = kvae.decode(z, Execution(strip_bytes=1 << 18, recompute=level)).float()
            assert_same(found, whole, 3e-2)


@pytest.mark.parametrize("size", [(17, 256, 448), (33, 480, 832)], ids=["one segment", "two segments"])
@pytest.mark.parametrize(("direction", "plan"), [("decode", plan_decode), ("encode", plan_encode)])
@pytest.mark.parametrize("name", MODELS)
def test_every_plan_holds(name, direction, plan, size):
    """Measured ≤ allowed: a plan counts tensors, and serving allows for what the library adds, once it has seen it."""
    config = MODELS[name]
    kvae = random_kvae(config, CUDA, torch.bfloat16).fold()
    source = source_of(config, direction, size, CUDA, torch.bfloat16)
    host = HostVAE(kvae)
    with torch.no_grad():
        getattr(host, direction)(source)
        for found in frontier(plan, kvae, source.shape, step=0.9):
            run = partial(exhaust, getattr(kvae, f"{direction}_parts"), source, found.execution)
            cost = cost_of(run, CUDA)
            assert cost, found
            assert cost.peak <= found.peak * allowance(kvae, direction, source), (str(found), cost.peak)
            assert found.peak <= 1.2 * cost.peak, (str(found), cost.peak)


@pytest.mark.parametrize("name", SMALL)
def test_ten_decodes_leave_nothing_behind(name):
    kvae = small(name).to("cuda", torch.bfloat16)
    x, z = (each.to("cuda", torch.bfloat16) for each in (clip(kvae, 21), latent(kvae, 6)))
    seen = set()
    with torch.no_grad():
        kvae.decode(z), kvae.encode(x)  # what is kept for good: folded weights, workspaces
        for _ in range(10):
            kvae.decode(z), kvae.encode(x)
            torch.cuda.synchronize()
            seen.add(torch.cuda.memory_allocated())
    assert len(seen) == 1


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("execution", EXECUTIONS, ids=["whole", "by strips"])
def test_segments_do_not_wait_for_the_device(name, execution):
    """PyTorch raises an error at each operator that would. Nothing is moved to or from the CPU here."""
    kvae = small(name).to("cuda", torch.bfloat16)
    x, z = (each.to("cuda", torch.bfloat16) for each in (clip(kvae, 37), latent(kvae, 10)))
    with torch.no_grad():
        expected = joined(kvae.decode_stream(z, execution)), joined(kvae.encode_stream(x, execution))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = joined(kvae.decode_stream(z, execution)), joined(kvae.encode_stream(x, execution))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, expected, strict=True):
        assert_same(a.float(), b.float(), 3e-2)
