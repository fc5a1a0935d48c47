"""Load KVAE's report names the files and the latents, and says how usual sizes are computed."""

import pytest
import torch

from kvae_comfyui.adapters import LatentAdapter, latent_space
from kvae_comfyui.adapters.networks import Affine, PointwiseNet
from kvae_comfyui.kvae import KVAE
from kvae_comfyui.serving.about import about
from kvae_comfyui.serving.host_vae import HostVAE

NAMES = ["KVAE-3D-1.0.safetensors", "adapter_hunyuan_to_kvae3d.safetensors", "k2h.safetensors"]


@pytest.fixture(scope="module")
def kvae():
    """KVAE-3D-1.0 without memory for its weights: plans need only their shapes."""
    with torch.device("meta"):
        return KVAE().to(torch.bfloat16)


def host_of(kvae, decode=None, encode=None, budget=None):
    host = HostVAE(kvae, decode, encode)
    host.planner.device, host.planner.budget = torch.device("cuda"), budget
    return host


def line(report, start):
    (found,) = [each for each in report.splitlines() if each.strip().startswith(start)]
    return found


def adapter(network, source, target, **described):
    return LatentAdapter(network, latent_space(source), latent_space(target), **described)


def test_native_latents_are_said_to_need_no_adapters(kvae):
    report = about(host_of(kvae), [NAMES[0], "", ""])
    assert report.splitlines()[0] == "KVAE-3D-1.0.safetensors: bf16, 1.2 GB of weights"
    assert "decodes and encodes kvae_3d_1.0 latents" in report


def test_the_adapters_that_are_used_say_what_they_are(kvae):
    decode = adapter(PointwiseNet(16, 16), "hunyuan_video", "kvae_3d_1.0")
    encode = adapter(Affine(16, 16), "kvae_3d_1.0", "hunyuan_video", metrics={"psnr": 30.5})
    report = about(host_of(kvae, decode, encode), NAMES)
    assert "decodes hunyuan_video latents through adapter_hunyuan_to_kvae3d.safetensors:" in report
    assert "18.9 dB, where the VAEs alone reach 31 to 32: for trying, not for pictures" in report
    assert line(report, "encodes").endswith("k2h.safetensors:") and "psnr: 30.5" in report
    report = about(host_of(kvae, decode), [*NAMES[:2], ""])
    assert "cannot encode hunyuan_video latents: no adapter" in report
    assert "encode" not in line(report, "832x480")


def test_a_size_is_exact_or_slower_or_in_tiles_by_the_free_memory(kvae):
    names = [NAMES[0], "", ""]
    assert "decode 11.2 GB, exact; encode 8.4 GB, exact" in line(about(host_of(kvae), names), "832x480")
    free = about(host_of(kvae), names, free=8 * 10**9)
    assert "8.0 GB are free" in line(free, "memory")
    assert "exact and slower (fastest in 11.2 GB); encode" in line(free, "832x480")
    assert "decode exact from 10.0 GB on, below that only in approximate tiles" in line(free, "1280x720")
    budget = about(host_of(kvae, budget=12 * 10**9), names, free=10**9)
    assert "memory_gb is 12" in line(budget, "memory")
    assert "decode 11.2 GB, exact; encode" in line(budget, "832x480")
    assert "exact and slower (fastest in 24.3 GB)" in line(budget, "1280x720")


def test_the_report_changes_nothing_of_the_vae_that_it_is_about(kvae):
    host = host_of(kvae, budget=8 * 10**9)
    before = host.planner
    about(host, [NAMES[0], "", ""])
    assert host.planner is before and host.planner.budget == 8 * 10**9
