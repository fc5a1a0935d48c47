"""HybridVAE: a KVAE and its adapters behind the interface of another VAE.

vae = HybridVAE(load_kvae("kvae.safetensors"),
                decode_adapter=load_adapter("adapter_hunyuan_to_kvae3d.safetensors"),
                encode_adapter=load_adapter("adapter_kvae3d_to_hunyuan.safetensors"))
z = vae.encode(video)       # raw HunyuanVideo latents, for any HunyuanVideo DiT
video = vae.decode(z)

# x_B3THW pixels in −1..1 as HunyuanVideo has them (x/127.5 − 1), z_Bcthw raw latents
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from ..kvae import KVAE, Method, WeightsError
from ..kvae.model import Progress
from ..kvae.pixels import hunyuan_from_kvae, kvae_from_hunyuan
from ..kvae.tiles import Part
from .files import LatentAdapter
from .spaces import native_space

DEFAULT = Method()


class NativeVAE(nn.Module):
    """A KVAE with HunyuanVideo's pixels, and with latents of its own."""

    def __init__(self, kvae: KVAE):
        super().__init__()
        self.kvae = kvae

    def encode(self, x_B3THW: Tensor, method: Method = DEFAULT, progress: Progress | None = None) -> Tensor:
        """[B, 3, T, H, W] in −1..1, any T, H, W → raw latents [B, c, t, h, w]; see `KVAE.encode_stream`.

        Args:
            method: how to compute (see `kvae.plan_encode`).
            progress: called with the number of frames done so far; may raise, to cancel.

        Raises:
            WeightsError: there is no adapter to encode with.
        """
        self.check_encodes()
        return self.from_kvae(self.kvae.encode(to_kvae_pixels(x_B3THW), method, progress))

    def decode(self, z_Bcthw: Tensor, method: Method = DEFAULT) -> Tensor:
        """Raw latents [B, c, t, h, w] → float32 [B, 3, 4(t − 1) + 1, H, W], about −1..1, not clipped.

        Raises:
            WeightsError: there is no adapter to decode with.
        """
        return from_kvae_pixels(self.kvae.decode(self.to_kvae(z_Bcthw), method))

    def decode_stream(self, z_Bcthw: Tensor, method: Method = DEFAULT) -> Iterator[Tensor]:
        """The same, segment by segment. An adapter sees the whole clip first: latents are small, frames are not."""
        for frames in self.kvae.decode_stream(self.to_kvae(z_Bcthw), method):
            yield from_kvae_pixels(frames)

    def decode_parts(self, z_Bcthw: Tensor, method: Method, progress: Progress | None = None) -> Iterator[Part]:
        """The same by segments of tiles, float32; see `KVAE.decode_parts`."""
        for part in self.kvae.decode_parts(self.to_kvae(z_Bcthw), method, progress):
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
        WeightsError: no adapter, or adapters that do not fit each other (swapped, say).
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
        for role, space in (
            ("decode", decode_adapter and decode_adapter.target),
            ("encode", encode_adapter and encode_adapter.source),
        ):
            if space and not space.name.startswith("kvae"):
                raise WeightsError(f"the {role}_adapter has {space.name} on KVAE's side: the two adapters are swapped")
            if space and space != native_space(kvae.config):
                raise WeightsError(f"the {role}_adapter is for {space.name}; this is {native_space(kvae.config).name}")
        if decode_adapter and encode_adapter and decode_adapter.source != encode_adapter.target:
            raise WeightsError(
                f"the adapters serve two spaces, {decode_adapter.source.name} and {encode_adapter.target.name}"
            )
        self.decode_adapter, self.encode_adapter = decode_adapter, encode_adapter

    def to_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """Raw foreign latents → KVAE's, both [B, c, t, h, w].

        Raises:
            WeightsError: there is no decode_adapter.
        """
        if self.decode_adapter is None:
            raise WeightsError(_missing("decode", self.encode_adapter.target.name, "kvae_3d_1.0"))  # type: ignore[union-attr]
        return self.decode_adapter(z_Bcthw)

    def from_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """KVAE's latents → raw foreign ones, both [B, c, t, h, w].

        Raises:
            WeightsError: there is no encode_adapter.
        """
        self.check_encodes()
        return self.encode_adapter(z_Bcthw)  # type: ignore[misc]

    def check_encodes(self) -> None:
        """Before the work of encoding.

        Raises:
            WeightsError: there is no encode_adapter.
        """
        if self.encode_adapter is None:
            raise WeightsError(_missing("encode", "kvae_3d_1.0", self.decode_adapter.source.name))  # type: ignore[union-attr]


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
