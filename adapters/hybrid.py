"""HybridVAE: a KVAE and its adapters behind the interface of another VAE.

vae = HybridVAE(load_kvae("kvae.safetensors"),
                decode_adapter=load_adapter("adapter_hunyuan_to_kvae3d.safetensors"),
                encode_adapter=load_adapter("adapter_kvae3d_to_hunyuan.safetensors"))
z = vae.encode(video)       # raw HunyuanVideo latents, for any HunyuanVideo DiT
video = vae.decode(z)

Inputs and adapters are moved to the KVAE's device.

# x_B3THW pixels in −1..1 in HunyuanVideo's convention (x/127.5 − 1), z_Bcthw raw latents
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..kvae import KVAE, Execution, WeightsError
from ..kvae.engine.execution import Executions, present
from ..kvae.engine.tiles import Part, whole_pictures
from ..kvae.frames import padded
from ..kvae.model import DEFAULT
from ..kvae.pixels import hunyuan_from_kvae, kvae_from_hunyuan
from ..kvae.signature import same_weights, signature
from .adapter import LatentAdapter
from .checks import check_finite, check_latent
from .published import PUBLISHED_FILES, published_address
from .spaces import LatentSpace, native_space
from .weights import VAEWeights, in_words


class HybridVAE(nn.Module):
    """A KVAE in place of the VAE whose latents the adapters translate. Without adapters, its latents are KVAE's own.

    Args:
        decode_adapter: foreign space → KVAE's.
        encode_adapter: KVAE's → foreign space. With only one adapter, the other direction raises a WeightsError.

    Raises:
        WeightsError: the adapters do not fit the KVAE or each other (swapped, or made for other weights).
    """

    def __init__(
        self,
        kvae: KVAE,
        decode_adapter: LatentAdapter | None = None,
        encode_adapter: LatentAdapter | None = None,
    ):
        super().__init__()
        self.kvae = kvae
        if decode_adapter:
            _check_side(kvae, "decode", decode_adapter, decode_adapter.target)
        if encode_adapter:
            _check_side(kvae, "encode", encode_adapter, encode_adapter.source)
        if decode_adapter and encode_adapter:
            _check_pair(decode_adapter, encode_adapter)
        self.decode_adapter, self.encode_adapter = decode_adapter, encode_adapter

    @property
    def space(self) -> LatentSpace:
        """The space of the latents that `encode` returns and `decode` reads."""
        if self.decode_adapter:
            return self.decode_adapter.source
        if self.encode_adapter:
            return self.encode_adapter.target
        return native_space(self.kvae.config)

    @property
    def side(self) -> int:
        """Rows, and columns, of pixels that make whole latents of `space` and of the KVAE."""
        return max(self.space.spatial_factor, self.kvae.config.spatial_factor)

    @property
    def weights_read(self) -> VAEWeights | None:
        """The weights of the VAE of `space` whose latents `decode` reads; None if its adapter does not name them."""
        return self._weights(self.decode_adapter)

    @property
    def weights_written(self) -> VAEWeights | None:
        """The weights of the VAE of `space` whose latents `encode` makes; None if its adapter does not name them.

        Through an adapter these are not KVAE's, but those of the foreign VAE that the adapter was made for: any decoder
        of that VAE's latents reads them, also another KVAE with adapters for it.
        """
        return self._weights(self.encode_adapter)

    def encode(self, x_B3THW: Tensor, execution: Execution = DEFAULT) -> Tensor:
        """[B, 3, T, H, W] in −1..1, any T, H, W → raw latents [B, c, t, h, w]; see `KVAE.encode_stream`.

        The last row and column are repeated up to a multiple of `side`.

        Args:
            execution: how to compute (see `kvae.plan_encode`).

        Raises:
            ValueError: a pixel is NaN or infinite, or as `KVAE.encode`.
            WeightsError: there is a decode_adapter, but no encode_adapter.
        """
        self.check_encodes()
        check_finite(x_B3THW, "pixels")
        return self.from_kvae(self.kvae.encode(self.kvae_pixels(x_B3THW), execution))

    def decode(self, z_Bcthw: Tensor, execution: Execution = DEFAULT) -> Tensor:
        """Raw latents [B, c, t, h, w] → float32 [B, 3, 4(t − 1) + 1, H, W], about −1..1, not clipped.

        Args:
            execution: how to compute (see `kvae.plan_decode`).

        Raises:
            ValueError: latents of another shape than those of `space`, sides that do not make whole latents of the
                KVAE, or values that are not finite.
            WeightsError: there is an encode_adapter, but no decode_adapter.
        """
        check_latent(z_Bcthw, self.space)
        return from_kvae_pixels(self.kvae.decode(self.to_kvae(z_Bcthw), execution))

    def decode_stream(self, z_Bcthw: Tensor, execution: Execution = DEFAULT) -> Iterator[Tensor]:
        """Yield the frames of each segment in turn, float32 [B, 3, 17 or 16, H, W].

        The adapter converts the latent piece by piece, too, so memory does not grow with the clip's length.

        Raises:
            ValueError, WeightsError: as `decode`.
        """
        check_latent(z_Bcthw, self.space)
        for frames in self.kvae.decode_stream(self._streamed_to_kvae(z_Bcthw), execution):
            yield from_kvae_pixels(frames)

    def decode_parts(self, z_Bcthw: Tensor, execution: Executions) -> Iterator[Part]:
        """Yield the parts of KVAE's frames, as `KVAE.decode_parts`. Values are not checked.

        Without tiles, the adapter converts the latent piece by piece.

        Raises:
            WeightsError: there is an encode_adapter, but no decode_adapter.
        """
        if present(execution).tiles == (1, 1):
            return whole_pictures(self.kvae.decode_stream(self._streamed_to_kvae(z_Bcthw), execution))
        return self.kvae.decode_parts(self.to_kvae(z_Bcthw), execution)

    def kvae_pixels(self, x_B3THW: Tensor) -> Tensor:
        """What `kvae` encodes of pixels [B, 3, T, H, W] in HunyuanVideo's −1..1.

        The KVAE pads pictures to its own latents. To coarser latents of `space` they are padded here.
        """
        if self.space.spatial_factor > self.kvae.config.spatial_factor:
            x_B3THW = padded(x_B3THW, x_B3THW.shape[2], self.side)
        return to_kvae_pixels(x_B3THW)

    def to_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """Raw latents of `space` → KVAE's raw latents, both [B, c, t, h, w]. Values are not checked.

        Raises:
            WeightsError: there is an encode_adapter, but no decode_adapter.
        """
        self.check_decodes()
        adapter = self.decode_adapter
        return adapter.convert(self._placed(adapter, z_Bcthw)) if adapter else z_Bcthw

    def from_kvae(self, z_Bcthw: Tensor) -> Tensor:
        """KVAE's raw latents → raw latents of `space`, both [B, c, t, h, w]. Values are not checked.

        Raises:
            WeightsError: there is a decode_adapter, but no encode_adapter.
        """
        self.check_encodes()
        adapter = self.encode_adapter
        return adapter.convert(self._placed(adapter, z_Bcthw)) if adapter else z_Bcthw

    def check_decodes(self) -> None:
        """Raise, before any work, if the adapter for decoding is missing.

        Raises:
            WeightsError: there is an encode_adapter, but no decode_adapter.
        """
        if self.encode_adapter and not self.decode_adapter:
            raise WeightsError(_missing("decode", self.space.name, native_space(self.kvae.config).name))

    def check_encodes(self) -> None:
        """Raise, before any work, if the adapter for encoding is missing.

        Raises:
            WeightsError: there is a decode_adapter, but no encode_adapter.
        """
        if self.decode_adapter and not self.encode_adapter:
            raise WeightsError(_missing("encode", native_space(self.kvae.config).name, self.space.name))

    def _weights(self, adapter: LatentAdapter | None) -> VAEWeights | None:
        if adapter:
            return adapter.weights.get(self.space.name)
        native = not (self.decode_adapter or self.encode_adapter)
        return VAEWeights("", signature(self.kvae.state_dict())) if native else None

    def _streamed_to_kvae(self, z_Bcthw: Tensor) -> Tensor | Iterator[Tensor]:
        """What `KVAE.decode_stream` reads of latents of `space`: KVAE's latents, in pieces if there is an adapter."""
        self.check_decodes()
        adapter = self.decode_adapter
        return adapter.stream(self._placed(adapter, z_Bcthw)) if adapter else z_Bcthw

    def _placed(self, adapter: LatentAdapter, z_Bcthw: Tensor) -> Tensor:
        """Latents for the adapter, both on the device of the KVAE, which a host may have moved without the adapter."""
        device = next(self.kvae.parameters()).device
        if next(adapter.parameters()).device != device:
            adapter.to(device)
        return z_Bcthw.to(device)


def _check_side(kvae: KVAE, role: str, adapter: LatentAdapter, space: LatentSpace) -> None:
    """Raise unless `space`, the adapter's space on KVAE's side, is that of this KVAE, with these weights."""
    native = native_space(kvae.config)
    if not space.name.startswith("kvae"):
        raise WeightsError(f"the {role}_adapter has {space.name} on KVAE's side: the two adapters are swapped")
    if space != native:
        raise WeightsError(f"the {role}_adapter is for {space.name}; this KVAE is {native.name}")
    adapter.check_fits(native.name, signature(kvae.state_dict()))


def _check_pair(decode_adapter: LatentAdapter, encode_adapter: LatentAdapter) -> None:
    """Raise unless both adapters are for the same foreign VAE."""
    foreign, other = decode_adapter.source.name, encode_adapter.target.name
    if foreign != other:
        raise WeightsError(f"the adapters are for two spaces, {foreign} and {other}; expected one")
    adapters = decode_adapter, encode_adapter
    known = [adapter.weights[foreign] for adapter in adapters if foreign in adapter.weights]
    if len(known) == 2 and not same_weights(*(each.signature for each in known)):
        one, two = (in_words(foreign, each) for each in known)
        raise WeightsError(
            f"the adapters were made for two VAEs: to decode, for {one}; to encode, for {two}; "
            "use two adapters from the same training"
        )


def to_kvae_pixels(x_B3THW: Tensor) -> Tensor:
    """HunyuanVideo's −1..1 (x/127.5 − 1) → KVAE's, in the dtype of x. Computed in float32: bfloat16 would band."""
    return kvae_from_hunyuan(x_B3THW.float()).to(x_B3THW.dtype)


def from_kvae_pixels(x_B3THW: Tensor) -> Tensor:
    """KVAE's −1..1, in any float dtype → HunyuanVideo's −1..1 (x/127.5 − 1), float32."""
    return hunyuan_from_kvae(x_B3THW.float())


def _missing(verb: str, source: str, target: str) -> str:
    text = f"cannot {verb}: no {source} → {target} adapter was given"
    names = [name for name, direction in PUBLISHED_FILES.items() if direction == (source, target)]
    known = f"put {names[0]} ({published_address(names[0])}) into models/latent_adapters, or " if names else ""
    return f"{text}; {known}train one"
