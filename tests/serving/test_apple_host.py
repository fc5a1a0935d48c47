"""HybridVAE and HostVAE on a stand-in for Apple's GPU give what they give on a CPU."""

import copy

import torch

from apple_gpu import AppleGPU
from kvae_comfyui.adapters import HybridVAE, load_adapter
from kvae_comfyui.kvae import load_kvae
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.training.vaes import TINY, TINY_ADAPTERS
from small_models import assert_same


def parts():
    decode, encode = (load_adapter(TINY_ADAPTERS[direction]) for direction in ("h2k", "k2h"))
    return load_kvae(TINY["kvae"]), decode, encode


def test_hybrid_vae():
    vae = HybridVAE(*parts())
    x = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        z = vae.encode(x)
        y = vae.decode(z)
        with AppleGPU():
            on_apple = copy.deepcopy(vae)
            on_apple.kvae.to("mps")  # a host moves the KVAE only; the adapters follow
            assert_same(on_apple.encode(x.to("mps")).cpu(), z, 1e-4)
            assert_same(on_apple.decode(z).cpu(), y, 1e-4)


def test_host_vae():
    vae = HostVAE(*parts())
    x = torch.rand(2, 3, 9, 64, 64) * 2 - 1
    z = vae.encode(x)
    frames = vae.decode(z)
    tiled = vae.decode_tiled(z, 5, 5, 2)
    with AppleGPU():
        on_apple = copy.deepcopy(vae)
        on_apple.kvae.to("mps")
        assert_same(on_apple.encode(x.to("mps")).cpu(), z, 1e-4)
        assert_same(on_apple.decode(z.to("mps")), frames, 1e-4)  # on `output_device`, the CPU
        assert_same(on_apple.decode_tiled(z.to("mps"), 5, 5, 2), tiled, 1e-4)
        streamed = torch.cat([each for each in on_apple.decode_stream(z[:1].to("mps"))], dim=2)
        assert_same(streamed, frames[:1], 1e-4)
