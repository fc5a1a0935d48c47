"""The two VAEs of a pair behind one interface: uint8 frames in, raw latents out, and back.

# B batch, T frames, t latent frames, H/W pixels, h/w latent rows and columns
x_B3THW uint8 frames, z_Bcthw raw float32 latents, y_B3THW float32 pixels 0..255
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..adapters.spaces import SPACES, LatentSpace, latent_space, native_space
from ..kvae import KVAE, WeightsError, load_kvae, pad_frames
from ..kvae.engine.convolution import Conv3d
from ..kvae.files import Weights, what_is
from ..kvae.find import find_weights
from ..kvae.finite import all_finite
from ..kvae.foreign import parse_object
from ..kvae.paths import read_text, sha256_of
from ..kvae.pixels import HUNYUAN_HALF_RANGE, KVAE_HALF_RANGE, from_unit, to_unit
from ..kvae.signature import signature
from .errors import UserError

ASSETS = Path(__file__).parent / "assets"
TINY = {"hunyuan": ASSETS / "tiny_hunyuan.safetensors", "kvae": ASSETS / "tiny_kvae.safetensors"}
TINY_ADAPTERS = {
    "h2k": ASSETS / "tiny_hunyuan_to_kvae.safetensors",
    "k2h": ASSETS / "tiny_kvae_to_hunyuan.safetensors",
}


class VideoVAE(Protocol):
    """What extraction and evaluation ask of a VAE. Pixels are cast, scaled and clipped inside."""

    space: LatentSpace
    source: str  # where the weights came from
    digest: str  # sha256 of the weights file
    signature: tuple[float, ...]  # of the weights in it, see kvae.signature

    def encode(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 [B, 3, T, H, W] → raw latents, the posterior's mean or, with a generator, a draw."""

    def decode(self, z_Bcthw: Tensor) -> Tensor:
        """Raw latents → float32 pixels in 0..255, clipped."""


class HunyuanVAE:
    """AutoencoderKLHunyuanVideo of diffusers, or AutoencoderKLHunyuanVideo15, as diffusers runs them.

    The first takes clips over 17 frames in blended temporal tiles; the second one clip of a batch after the other,
    since its attention fails for batches.
    """

    def __init__(self, vae, source: str, digest: str):
        self.vae, self.source, self.digest = vae, source, digest
        self.signature = signature(vae.state_dict())
        newer = type(vae).__name__ == "AutoencoderKLHunyuanVideo15"
        self.space = latent_space("hunyuan_video_1.5" if newer else "hunyuan_video")
        if newer:
            vae.enable_slicing()

    @torch.inference_mode()
    def encode(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = pad_frames(to_unit(x_B3THW.to(self.vae.device), HUNYUAN_HALF_RANGE)).to(self.vae.dtype)
        posterior = self.vae.encode(x).latent_dist
        return (posterior.sample(generator) if generator else posterior.mode()).float()

    @torch.inference_mode()
    def decode(self, z_Bcthw: Tensor) -> Tensor:
        x = self.vae.decode(z_Bcthw.to(self.vae.device, self.vae.dtype)).sample
        return from_unit(x, HUNYUAN_HALF_RANGE)


class KandinskyVAE:
    """KVAE-3D of this project."""

    def __init__(self, kvae: KVAE, source: str, digest: str):
        self.kvae, self.source, self.digest = kvae, source, digest
        self.signature = signature(kvae.state_dict())
        self.space = native_space(kvae.config)

    @torch.inference_mode()
    def encode(self, x_B3THW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = x_B3THW.to(next(self.kvae.parameters()).device)  # as bytes, a quarter of the floats
        posterior = self.kvae.posterior(to_unit(x, KVAE_HALF_RANGE))
        return (posterior.sample(generator) if generator else posterior.mean).float()

    @torch.inference_mode()
    def decode(self, z_Bcthw: Tensor) -> Tensor:
        return from_unit(self.kvae.decode(z_Bcthw), KVAE_HALF_RANGE)


def load_hunyuan_vae(name: str, device: str, dtype: torch.dtype = torch.float32) -> HunyuanVAE:
    """The VAE of HunyuanVideo or HunyuanVideo 1.5 from "tiny", a folder, a .safetensors file or a hub id.

    Keys are diffusers', for the first also Tencent's or ComfyUI's.

    Raises:
        WeightsError: nothing there, or something else; the message says what.
    """
    from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15

    path = _weights_file(name, "hunyuan", subfolder="vae")
    weights = Weights(path)
    kind = what_is(weights.shapes)
    if not kind.startswith("a HunyuanVideo VAE"):
        raise WeightsError(f"{path}: this is {kind}; expected a HunyuanVideo VAE (--hunyuan-vae)")
    config = _config(path, weights)
    newer = "encoder.mid_block.attentions.0.norm.gamma" in weights.shapes  # the first has a group_norm there
    try:
        with torch.device("meta"):
            vae = (AutoencoderKLHunyuanVideo15 if newer else AutoencoderKLHunyuanVideo).from_config(config)
            _replace_convolutions(vae)
    except Exception as error:  # diffusers checks little, so a config can fail anywhere within it
        raise WeightsError(f"{path}: its config is not that of a HunyuanVideo VAE ({_first_line(error)})") from None
    state = {key: weights[key] for key in weights.shapes}
    if "decoder.mid.attn_1.q.weight" in state:
        state = {diffusers_key(key): tensor for key, tensor in state.items()}
        # ComfyUI's attention is made of 1x1x1 convolutions, diffusers' of matrices
        state = {key: v.flatten(1) if ".to_" in key and v.ndim == 5 else v for key, v in state.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise WeightsError(f"{path}: {len(wrong)} tensors are not those of a HunyuanVideo VAE, first {wrong[0]}")
    for key, tensor in state.items():
        if not (tensor.is_floating_point() and all_finite(tensor)):
            raise WeightsError(f"{path}: {key} holds what are no finite numbers; download or make it again")
    vae.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)
    return HunyuanVAE(vae.to(device).eval().requires_grad_(False), name, sha256_of(path))


def _replace_convolutions(vae: nn.Module) -> None:
    """On a CPU they then take half the time; what they give is the same."""
    for parent in list(vae.modules()):
        for name, conv in parent.named_children():
            if type(conv) is nn.Conv3d and conv.padding == (0, 0, 0):
                ours = Conv3d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)  # type: ignore[arg-type]
                setattr(parent, name, ours)


def load_kandinsky_vae(name: str, device: str, dtype: torch.dtype = torch.float32) -> KandinskyVAE:
    """A KVAE-3D from "tiny", a folder, a .safetensors file or a hub id. Raises as `load_hunyuan_vae` does."""
    path = _weights_file(name, "kvae", subfolder="")
    return KandinskyVAE(load_kvae(path, dtype, device), name, sha256_of(path))


def made_with(vae: VideoVAE) -> dict:
    """What a manifest says of a VAE."""
    return {"space": vae.space.name, "sha256": vae.digest, "signature": list(vae.signature)}


def check_grids(hunyuan: LatentSpace, kvae: LatentSpace) -> None:
    """An adapter maps latents position by position, so both spaces must have the same positions.

    Raises:
        UserError: they have not; the message says which would go together.
    """

    def grid(each: LatentSpace) -> tuple[int, int]:
        return each.temporal_factor, each.spatial_factor

    if grid(hunyuan) == grid(kvae):
        return
    fitting = [
        f"{one.name} with {other.name}"
        for one in SPACES.values()
        for other in SPACES.values()
        if one.name.startswith("hunyuan") and other.name.startswith("kvae") and grid(one) == grid(other)
    ]
    (frames_h, side_h), (frames_k, side_k) = grid(hunyuan), grid(kvae)
    raise UserError(
        f"{hunyuan.name} has one latent for {frames_h} frames of {side_h}x{side_h} pixels, "
        f"{kvae.name} one for {frames_k} of {side_k}x{side_k}; an adapter maps latent to latent, so it needs "
        f"two VAEs of one grid: {', '.join(fitting)}"
    )


def diffusers_key(key: str) -> str:
    """A key of ComfyUI's file of the HunyuanVideo VAE → diffusers' (which are Tencent's own).

    The two count the decoder's levels from opposite ends.
    """
    key = re.sub(r"down\.(\d)\.block\.(\d)", r"down_blocks.\1.resnets.\2", key)
    key = re.sub(r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0", key)
    key = re.sub(r"up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{3 - int(m[1])}.resnets.{m[2]}", key)
    key = re.sub(r"up\.(\d)\.upsample", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0", key)
    key = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
    key = re.sub(r"mid\.attn_1\.([qkv])\b", r"mid_block.attentions.0.to_\1", key)
    for theirs, ours in (
        ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
        ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
        ("nin_shortcut", "conv_shortcut"),
        ("coder.norm_out", "coder.conv_norm_out"),
    ):
        key = key.replace(theirs, ours)
    return key


def _weights_file(name: str, which: str, subfolder: str) -> Path:
    return TINY[which] if name == "tiny" else find_weights(name, subfolder)


def _config(path: Path, weights: Weights) -> dict:
    beside = path.parent / "config.json"
    try:
        if "config" in weights.metadata:
            config = parse_object(weights.metadata["config"])
        else:
            config = parse_object(read_text(beside)) if beside.is_file() else {}
        _check_bounds(config, weights)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: its config is not that of a HunyuanVideo VAE ({error})") from None
    return config


def _check_bounds(config: dict, weights: Weights) -> None:
    """No model is made that has more layers or channels than the file has: it might never end.

    Raises:
        ValueError: there are more.
    """
    most = max([len(weights.shapes), *(size for shape in weights.shapes.values() for size in shape)])
    for key in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "block_out_channels"):
        value = config.get(key, 1)
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > most or not all(type(each) is int and 0 < each <= most for each in numbers):
            raise ValueError(f"{key} is {str(value)[:60]}, which is not of this file")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
