"""Small random models of each kind of KVAE-3D, and random clips and latents for them."""

from dataclasses import replace

import torch

from kvae_comfyui.kvae import KVAE, KVAEConfig, Posterior

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
VERSION_TWO = ["2.0-t4s8", "2.0-t4s16"]


def small(name: str, **changes: int) -> KVAE:
    """A small model of that kind, frozen, with random weights."""
    kvae = KVAE(replace(SMALL[name], **changes)).eval().requires_grad_(False)
    for key, parameter in kvae.named_parameters():
        if parameter.ndim < 2 or key.endswith("gamma"):
            torch.nn.init.normal_(parameter, mean=float(key.endswith("gamma")), std=0.1)
    return kvae.fold()


def clip(kvae: KVAE, frames: int, rows: int = 2, columns: int = 3, batch: int = 1) -> torch.Tensor:
    """Random frames [B, 3, T, H, W] in [-1, 1]; rows and columns are counted in latents."""
    side = kvae.config.spatial_factor
    return torch.rand(batch, 3, frames, rows * side, columns * side) * 2 - 1


def latent(kvae: KVAE, frames: int, rows: int = 2, columns: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, kvae.config.z_channels, frames, rows, columns)


def joined(stream):
    """The parts of a stream of frames or posteriors, as one tensor."""
    parts = list(stream)
    return torch.cat([part.mean if isinstance(part, Posterior) else part for part in parts], dim=2)


def assert_same(a, b, tolerance=1e-5):
    """Check that two tensors have one shape, and differ by no more than this share of the norm of the second."""
    assert a.shape == b.shape
    assert ((a - b).norm() / b.norm()).item() <= tolerance
