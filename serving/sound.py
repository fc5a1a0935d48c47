"""Sound for a video: checked before any work, and written as AAC, mono or stereo."""

from __future__ import annotations

import logging
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)  # sample rates of AAC
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # FFmpeg's names
_EXPECTED = 'expected ComfyUI\'s AUDIO, {"waveform": [1, channels, samples], "sample_rate": whole number}'


class Sound:
    """Samples [C, N] of one clip, at `rate` samples per second.

    Args:
        audio: ComfyUI's AUDIO, {"waveform": [B, C, N], "sample_rate": …}, of which the first clip is used.

    Raises:
        ValueError: not an AUDIO, or more than 8 channels.
    """

    def __init__(self, audio: Any):
        waveform, rate = waveform_of(audio)
        if waveform.ndim != 3 or not len(waveform):
            raise ValueError(f"audio: the waveform has shape {list(waveform.shape)}; {_EXPECTED}")
        if waveform.shape[1] not in LAYOUTS:
            raise ValueError(f"audio: {waveform.shape[1]} channels; expected 1 to {max(LAYOUTS)}")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 2**24 or rate % 1:
            raise ValueError(f"audio: sample_rate is {rate!r}; {_EXPECTED}")
        self.samples, self.rate = waveform[0], int(rate)
        if not torch.isfinite(self.samples).all():
            logger.warning("Some samples of the sound are NaN or infinite; they are written as silence.")

    def frame(self, first: int, last: int) -> av.AudioFrame:
        """The samples first:last as an audio frame. NaN and infinite values, which encoders refuse, become silence."""
        samples = self.samples[:, first:last].float().nan_to_num(0, 0, 0).cpu()
        interleaved = np.ascontiguousarray(samples.T.reshape(1, -1).numpy())
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=LAYOUTS[len(samples)])
        frame.sample_rate, frame.pts, frame.time_base = self.rate, first, Fraction(1, self.rate)
        return frame


class SoundTrack:
    """The audio stream of a file, written up to the last frame. If it fails, the video goes on without it."""

    def __init__(self, container: Any, sound: Sound):
        self.container, self.sound, self.written, self.failed = container, sound, 0, False
        # PyAV's encoder resamples other rates and mixes other layouts down
        rate = sound.rate if sound.rate in RATES else 48000
        layout = "mono" if len(sound.samples) == 1 else "stereo"
        self.stream = container.add_stream("aac", rate=rate, layout=layout)

    def write_until(self, seconds: Fraction) -> None:
        """Encode the samples up to that time that are not encoded yet."""
        last = min(round(seconds * self.sound.rate), self.sound.samples.shape[1])
        while not self.failed and self.written < last:
            end = min(last, self.written + self.sound.rate)
            self._encode(self.written, end)
            self.written = end

    def close(self) -> None:
        """Flush the encoder."""
        if not self.failed:
            self._encode(None, None)

    def _encode(self, first: int | None, last: int | None) -> None:
        try:
            frame = None if first is None or last is None else self.sound.frame(first, last)
            self.container.mux(self.stream.encode(frame))
        except Exception as error:
            if isinstance(error, OSError):  # the disk's fault, not the sound's
                raise
            self.failed = True
            logger.warning("The sound of the video ends after %.2f s: %s", self.written / self.sound.rate, error)


def audio_of_clip(audio: Any, clip: int, clips: int) -> Any:
    """The AUDIO of one of `clips` clips: its own if there is one for each, else the same for all. None stays None.

    Raises:
        ValueError: not an AUDIO.
    """
    if audio is None:
        return None
    waveform, rate = waveform_of(audio)
    own = waveform.ndim == 3 and len(waveform) == clips
    return {"waveform": waveform[clip : clip + 1] if own else waveform, "sample_rate": rate}


def waveform_of(audio: Any) -> tuple[Tensor, Any]:
    """Waveform and sample rate of an AUDIO.

    Raises:
        ValueError: it has none.
    """
    try:
        waveform, rate = audio["waveform"], audio["sample_rate"]
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"audio: {type(audio).__name__} without waveform or sample_rate; {_EXPECTED}") from None
    if not isinstance(waveform, Tensor):
        raise ValueError(f"audio: the waveform is a {type(waveform).__name__}; {_EXPECTED}")
    if waveform.is_complex():
        raise ValueError(f"audio: the waveform is of {waveform.dtype}; {_EXPECTED}")
    return waveform, rate
