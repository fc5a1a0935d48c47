"""Read a KVAE-3D's config in each spelling that people have on their disks.

| keys | where |
|---|---|
| encoder_widths … | files of `save_kvae` |
| model: encoder_params, decoder_params | config.json of kandinskylab/KVAE-3D-1.0, -2.0-t4s8 and -2.0-t4s16 |
| encoder_config, decoder_config | vae/config.json of Kandinsky-6.0-VSR-…-Diffusers, and of its own converter |
| ch, decoder_ch, norm_type … | the same file in later versions; diffusers' AutoencoderKLKVAEVideo has some of them |
| encoder_block_out_channels … | diffusers' Kandinsky6SRVAE, always 2.0 with zeros as padding |

The first is our own. The next three have the arguments of the official constructors
(https://github.com/kandinskylab/kvae, kvae/models/kvae_3d.py), missing ones with the constructors' defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .foreign import build

MOST_CONFIG_BYTES = 1 << 16
_CLASSES = ("AutoencoderKLKVAEVideo", "Kandinsky6SRVAE")  # diffusers 0.42
_TYPE = "video-kvae"  # Kandinsky 6's vae_type
_PAIRS = (("encoder_params", "decoder_params"), ("encoder_config", "decoder_config"))
_NORMS = {"group_norm": "group", "rms_norm": "rms"}


@dataclass(frozen=True)
class _Half:
    """The arguments of the official encoder or decoder that define a model."""

    ch: float = 128
    ch_mult: tuple[float, ...] = (1, 2, 4, 8)
    num_res_blocks: int = 2
    z_channels: int = 16
    temporal_compress_times: int = 4
    temporal_compress_start_level: int = 0
    norm_type: str = "group_norm"
    padding_mode: str | None = None
    downsample_version: int = 1  # of the encoder

    @property
    def widths(self) -> list[int]:
        return [round(self.ch * mult) for mult in self.ch_mult]

    def shared(self) -> dict[str, Any]:
        """What both halves of a model have in common, as fields of a `KVAEConfig`."""
        return {
            "num_res_blocks": self.num_res_blocks,
            "z_channels": self.z_channels,
            "temporal_compress_times": self.temporal_compress_times,
            "temporal_start_level": self.temporal_compress_start_level,
            "norm": _NORMS.get(self.norm_type, self.norm_type),
            "padding": self.padding_mode or "replicate",
        }


@dataclass(frozen=True)
class _Kandinsky6SRVAE:
    """The arguments of diffusers' class that define a model."""

    latent_channels: int = 64
    encoder_block_out_channels: tuple[int, ...] = (16, 128, 256, 512, 1024)
    decoder_block_out_channels: tuple[int, ...] = (16, 256, 512, 1024, 2048)
    layers_per_block: int = 2
    temporal_compression_ratio: int = 4
    temporal_compression_start_level: int = 1


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `KVAEConfig`, from a config in any spelling. Keys about training or a library are ignored.

    Types are checked in the spellings of others; `foreign.build` checks those of our fields.

    Raises:
        ValueError, OverflowError: the values have no known spelling, another type, or contradict each other.
    """
    model = _object(values, "model") if "model" in values else values
    for pair in _PAIRS:
        if pair[0] in model or pair[1] in model:
            encoder, decoder = (build(_Half, _object(model, name)) for name in pair)
            return _from_halves(encoder, decoder, pair)
    if "encoder_block_out_channels" in model:
        return _from_diffusers(build(_Kandinsky6SRVAE, dict(model)))
    if "ch" in model or is_kvae(model):
        own = {name: model[key] for name in ("ch", "ch_mult") if model.get(key := f"decoder_{name}") is not None}
        return _from_halves(build(_Half, dict(model)), build(_Half, {**model, **own}), ("encoder", "decoder"))
    if "encoder_widths" in model:
        return dict(model)
    raise ValueError("no ch, encoder_config, encoder_block_out_channels, model or encoder_widths in it")


def is_kvae(values: Mapping[str, Any]) -> bool:
    """Whether a VAE's config in a pipeline's folder says that it is a KVAE-3D."""
    return values.get("vae_type") == _TYPE or values.get("_class_name") in _CLASSES


def _object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} is {found!r:.60}; expected an object")
    return dict(found)


def _from_halves(encoder: _Half, decoder: _Half, names: tuple[str, str]) -> dict[str, Any]:
    shared, other = encoder.shared(), decoder.shared()
    for name, value in shared.items():
        if value != other[name]:
            raise ValueError(f"{names[0]} says {name} is {value}, {names[1]} says {other[name]}")
    return {
        "encoder_widths": encoder.widths,
        "decoder_widths": decoder.widths,
        "downsample_version": encoder.downsample_version,
        **shared,
    }


def _from_diffusers(vae: _Kandinsky6SRVAE) -> dict[str, Any]:
    return {
        "encoder_widths": list(vae.encoder_block_out_channels),
        "decoder_widths": list(vae.decoder_block_out_channels),
        "num_res_blocks": vae.layers_per_block,
        "z_channels": vae.latent_channels,
        "temporal_compress_times": vae.temporal_compression_ratio,
        "temporal_start_level": vae.temporal_compression_start_level,
        "norm": "rms",
        "downsample_version": 2,
        "padding": "zeros",
    }
