"""HybridVAE: a KVAE and its adapters behind the interface of another VAE.

vae = HybridVAE(load_kvae("kvae.safetensors"),
                decode_adapter=load_adapter("adapter_hunyuan_to_kvae3d.safetensors"),
                encode_adapter=load_adapter("adapter_kvae3d_to_hunyuan.safetensors"))
z = vae.encode(video)       # raw HunyuanVideo latents, for any HunyuanVideo DiT
video = vae.decode(z)

Everything goes where the KVAE is: the adapters, and what is encoded or decoded.

# x_B3THW pixels in −1..1 as HunyuanVideo has them (x/127.5 − 1), z_Bcthw raw latents
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..kvae import KVAE, Execution, WeightsError
from ..kvae.engine.tiles import Part
from ..kvae.model import Progress
from ..kvae.pixels import hunyuan_from_kvae, kvae_from_hunyuan
from ..kvae.signature import same_weights, signature
from .files import LatentAdapter
from .inspect import check_finite, check_latent
from .spaces import LatentSpace, native_space

DEFAULT = Execution()


class NativeVAE(nn.Module):
    """A KVAE with HunyuanVideo's pixels, and with latents of its own."""

    def __init__(self, kvae: KVAE):
        super().__init__()
        self.kvae = kvae

    @property
    def space(self) -> LatentSpace:
        """The space of the latents that it takes and gives."""
        return native_space(self.kvae.config)

    def encode(self, x_B3THW: Tensor, execution: Execution = DEFAULT, progress: Progress | None = None) -> Tensor:
        """[B, 3, T, H, W] in −1..1, any T, H, W → raw latents [B, c, t, h, w]; see `KVAE.encode_stream`.

        Args:
            execution: how to compute (see `kvae.plan_encode`).
            progress: called with the number of frames done so far; may raise, to cancel.

        Raises:
            ValueError: pixels that are not finite.
            WeightsError: there is no adapter to encode with.
        """
        self.check_encodes()
        check_finite(x_B3THW, "pixels")
        return self.from_kvae(self.kvae.encode(to_kvae_pixels(x_B3THW), execution, progress))

    def decode(self, z_Bcthw: Tensor, execution: Execution = DEFAULT) -> Tensor:
        """Raw latents [B, c, t, h, w] → float32 [B, 3, 4(t − 1) + 1, H, W], about −1..1, not clipped.

        Raises:
            ValueError: they are not latents of its space, or not finite.
            WeightsError: there is no adapter to decode with.
        """
        check_latent(z_Bcthw, self.space)
        return from_kvae_pixels(self.kvae.decode(self.to_kvae(z_Bcthw), execution))

    def decode_stream(self, z_Bcthw: Tensor, execution: Execution = DEFAULT) -> Iterator[Tensor]:
        """The same, segment by segment. An adapter sees the whole clip first: latents are small, frames are not."""
        check_latent(z_Bcthw, self.space)
        for frames in self.kvae.decode_stream(self.to_kvae(z_Bcthw), execution):
            yield from_kvae_pixels(frames)

    def decode_parts(self, z_Bcthw: Tensor, execution: Execution, progress: Progress | None = None) -> Iterator[Part]:
        """The same by segments of tiles, float32; see `KVAE.decode_parts`."""
        check_latent(z_Bcthw, self.space)
        for part in self.kvae.decode_parts(self.to_kvae(z_Bcthw), execution, progress):
            yield replace(part, x=from_kvae_pixels(part.x))

    def to_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """Raw latents → KVAE's, both [B, c, t, h, w]."""
        return z_Bcthw

    def from_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """KVAE's latents → raw ones, both [B, c, t, h, w]."""
        return z_Bcthw

    def check_encodes(self) -> None:
        """Refuse, before the work of encoding, what cannot be encoded for."""


class HybridVAE(NativeVAE):
    """KVAE in place of the VAE whose latents the adapters translate.

    Args:
        decode_adapter: foreign space → KVAE's; without it `decode` refuses.
        encode_adapter: KVAE's → foreign space; without it `encode` refuses.

    Raises:
        WeightsError: no adapter, or adapters that do not fit the KVAE or each other (swapped, or of other weights).
    """

    def __init__(
        self,
        kvae: KVAE,
        decode_adapter: LatentAdapter | None = None,
        encode_adapter: LatentAdapter | None = None,
    ):
        super().__init__(kvae)
        if decode_adapter is None and encode_adapter is None:
            raise WeightsError("HybridVAE needs an adapter: one to decode, one to encode, or both")
        for role, adapter, space in (
            ("decode", decode_adapter, decode_adapter and decode_adapter.target),
            ("encode", encode_adapter, encode_adapter and encode_adapter.source),
        ):
            if adapter and space:
                _check_side(kvae, role, adapter, space)
        if decode_adapter and encode_adapter:
            _check_pair(decode_adapter, encode_adapter)
        self.decode_adapter, self.encode_adapter = decode_adapter, encode_adapter

    @property
    def space(self) -> LatentSpace:
        if self.decode_adapter:
            return self.decode_adapter.source
        return self.encode_adapter.target  # type: ignore[union-attr]

    def to_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """Raw foreign latents → KVAE's, both [B, c, t, h, w].

        Raises:
            WeightsError: there is no decode_adapter.
        """
        if self.decode_adapter is None:
            raise WeightsError(_missing("decode", self.space.name, native_space(self.kvae.config).name))
        return self._beside(self.decode_adapter)(z_Bcthw.to(self._device))

    def from_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """KVAE's latents → raw foreign ones, both [B, c, t, h, w].

        Raises:
            WeightsError: there is no encode_adapter.
        """
        self.check_encodes()
        return self._beside(self.encode_adapter)(z_Bcthw)  # type: ignore[arg-type]

    def check_encodes(self) -> None:
        """Before the work of encoding.

        Raises:
            WeightsError: there is no encode_adapter.
        """
        if self.encode_adapter is None:
            raise WeightsError(_missing("encode", native_space(self.kvae.config).name, self.space.name))

    @property
    def _device(self) -> torch.device:
        return next(self.kvae.parameters()).device

    def _beside(self, adapter: LatentAdapter) -> LatentAdapter:
        """The adapter where the KVAE is, which may have been moved by itself."""
        if next(adapter.parameters()).device != self._device:
            adapter.to(self._device)
        return adapter


def _check_side(kvae: KVAE, role: str, adapter: LatentAdapter, space: LatentSpace) -> None:
    """Whether the adapter's space on KVAE's side is that of this KVAE."""
    native = native_space(kvae.config)
    if not space.name.startswith("kvae"):
        raise WeightsError(f"the {role}_adapter has {space.name} on KVAE's side: the two adapters are swapped")
    if space != native:
        raise WeightsError(f"the {role}_adapter is for {space.name}; this is {native.name}")
    adapter.check_fits(native.name, signature(kvae.state_dict()))


def _check_pair(decode_adapter: LatentAdapter, encode_adapter: LatentAdapter) -> None:
    """Whether both are for the same foreign VAE."""
    foreign, other = decode_adapter.source.name, encode_adapter.target.name
    if foreign != other:
        raise WeightsError(f"the adapters serve two spaces, {foreign} and {other}")
    known = [
        adapter.weights[foreign].signature for adapter in (decode_adapter, encode_adapter) if foreign in adapter.weights
    ]
    if len(known) == 2 and not same_weights(*known):
        raise WeightsError(
            f"the two adapters were made for {foreign} VAEs with different weights; use a pair of one training"
        )


def to_kvae_pixels(x_B3THW: Tensor) -> Tensor:
    """−1..1 as x/127.5 − 1 → KVAE's convention, in the dtype given; computed in float32, since bfloat16 would band."""
    return kvae_from_hunyuan(x_B3THW.float()).to(x_B3THW.dtype)


def from_kvae_pixels(x_B3THW: Tensor) -> Tensor:
    """KVAE's convention, in any dtype → −1..1 as x/127.5 − 1, float32."""
    return hunyuan_from_kvae(x_B3THW.float())


def _missing(verb: str, source: str, target: str) -> str:
    file = {
        "encode": "adapter_kvae3d_to_hunyuan.safetensors",
        "decode": "adapter_hunyuan_to_kvae3d.safetensors",
    }[verb]
    return f"cannot {verb}: no {source} → {target} adapter was given (published as {file})"
