"""The audio part of a nested latent, decoded with the audio VAE of its model."""

from __future__ import annotations

from typing import Any

import torch
from comfy.sd import VAE

from .latent_dict import parts_of


def decode_soundtrack(audio_vae: Any, latent: dict) -> dict:
    """ComfyUI's AUDIO {"waveform": [B, channels, samples], "sample_rate": …} of a latent with audio.

    As in VAE Decode Audio, a clip whose standard deviation is above 0.2 is made quieter, so that it does not clip.

    Args:
        audio_vae: ComfyUI's VAE, or LTX-2's own audio VAE of ComfyUI before it was one.

    Raises:
        ValueError: the latent has no audio, or this VAE does not read it.
    """
    parts = parts_of(latent)
    if len(parts) < 2:
        raise ValueError(
            "This latent has no audio part for audio_vae to decode; disconnect audio_vae, or connect a latent of a "
            "model that makes video with audio."
        )
    z = parts[-1]
    _check(audio_vae, z)
    waveform = audio_vae.decode(z)
    if isinstance(audio_vae, VAE):
        waveform = waveform.movedim(-1, 1)  # it has its channels last
    if waveform.ndim != 3:
        raise ValueError(f"audio_vae returned {list(waveform.shape)}; expected audio. Connect the model's audio VAE.")
    waveform = waveform.float()
    loud = 5 * waveform.std(dim=(1, 2), keepdim=True)
    return {"waveform": waveform / loud.clamp(min=1), "sample_rate": _sample_rate(audio_vae, latent)}


def _check(audio_vae: Any, z: torch.Tensor) -> None:
    """Raise unless this looks like an audio VAE for these latents. ComfyUI gives every VAE an audio_sample_rate."""
    if isinstance(audio_vae, VAE):
        audio = audio_vae.output_channels <= 2
    else:
        audio = hasattr(audio_vae, "decode") and hasattr(audio_vae, "output_sample_rate")
    if not audio:
        found = type(getattr(audio_vae, "first_stage_model", audio_vae)).__name__
        raise ValueError(f"audio_vae is a {found}, not an audio VAE; connect the audio VAE of the model, or none.")
    if z.shape[1:2] != (audio_vae.latent_channels,):
        raise ValueError(
            f"The audio part of this latent is {list(z.shape)}; this audio VAE reads latents of "
            f"{audio_vae.latent_channels} channels. Connect the audio VAE of the model that made the latent."
        )


def _sample_rate(audio_vae: Any, latent: dict) -> int:
    """What the VAE says of its output comes first: a latent's own rate may be that of what was encoded."""
    stated = getattr(audio_vae, "audio_sample_rate_output", None) or getattr(audio_vae, "output_sample_rate", None)
    return int(stated or latent.get("sample_rate") or getattr(audio_vae, "audio_sample_rate", 0) or 44100)
