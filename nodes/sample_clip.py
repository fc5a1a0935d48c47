"""Sample Clip: frames for trying a VAE without a file."""

from __future__ import annotations

from comfy_api.latest import io

from ..serving.sample_clip import sample_clip
from .schema import VIDEO, schema


class KVAESampleClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVAESampleClip",
            display_name="Sample Clip",
            category=VIDEO,
            search_aliases=["test video", "test pattern", "test clip", "dummy video"],
            description="A built-in test clip: a drifting colour gradient, a disc, fine stripes and a grey ramp.",
            inputs=[
                io.Int.Input("width", default=256, min=16, max=4096, step=16, tooltip="Width in pixels."),
                io.Int.Input("height", default=160, min=16, max=4096, step=16, tooltip="Height in pixels."),
                io.Int.Input(
                    "length",
                    default=33,
                    min=1,
                    max=1025,
                    tooltip="Number of frames. Video VAEs work in 4n + 1 frames (5, 9 … 33).",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The frames.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, length: int) -> io.NodeOutput:
        return io.NodeOutput(sample_clip(length, height, width))
