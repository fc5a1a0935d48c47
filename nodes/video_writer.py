"""Write a video file segment by segment, so that memory does not grow with its length."""

from __future__ import annotations

import os
from fractions import Fraction

import av
import torch

CODECS = {"h264": "libx264", "h265": "libx265", "av1": "libsvtav1"}
_BT709 = 1  # the number of ITU-T H.273 for matrix, primaries and transfer, and that of libswscale for the matrix


class VideoWriter:
    """An mp4 file that appears when it is complete; a failure or Cancel before that leaves nothing.

    with VideoWriter(path, 1280, 720, fps=24) as writer:
        for frames in segments:        # [T, H, W, 3] in 0..1
            writer.write(frames)

    Args:
        crf: constant quality of the codec; lower is better and larger.
        audio: ComfyUI's AUDIO, {"waveform": [B, C, N], "sample_rate": …}, cut where the video ends.
        metadata: texts for the file's header.
    """

    def __init__(self, path: str, width: int, height: int, fps: float, codec="h264", crf=18, audio=None, metadata=None):
        self.path, self.partial = path, f"{path}.partial"
        self.fps, self.audio, self.written = Fraction(fps).limit_denominator(1001), audio, 0
        self.container = av.open(self.partial, "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"})
        for key, value in (metadata or {}).items():
            self.container.metadata[key] = value
        video = self.container.add_stream(CODECS[codec], rate=self.fps)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"crf": str(crf)}
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        self.video = video
        if audio is not None:
            self.sound = self.container.add_stream("aac", rate=audio["sample_rate"], layout=self._layout())

    def write(self, frames_THW3: torch.Tensor) -> None:
        """Append frames in 0..1."""
        for picture in (frames_THW3 * 255).round().to("cpu", torch.uint8).numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709)
            frame.pts, frame.time_base = self.written, 1 / self.fps
            self.container.mux(self.video.encode(frame))
            self.written += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.container.mux(self.video.encode(None))
                if self.audio is not None:
                    self._write_audio()
            self.container.close()
            if kind is None:
                os.replace(self.partial, self.path)
        finally:
            if os.path.exists(self.partial):
                os.remove(self.partial)

    def _write_audio(self) -> None:
        rate = self.audio["sample_rate"]
        samples = self.audio["waveform"][0, :2, : round(self.written / self.fps * rate)].float().cpu().contiguous()
        frame = av.AudioFrame.from_ndarray(samples.numpy(), format="fltp", layout=self._layout())
        frame.sample_rate, frame.pts = rate, 0
        self.container.mux(self.sound.encode(frame))
        self.container.mux(self.sound.encode(None))

    def _layout(self) -> str:
        return "mono" if self.audio["waveform"].shape[1] == 1 else "stereo"
