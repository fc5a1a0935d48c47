"""What the page shows while a VAE works: the bar, the newest picture, and the time left."""

from __future__ import annotations

import sys

import comfy.model_management
import comfy.utils
from latent_preview import MAX_PREVIEW_RESOLUTION
from PIL import Image
from torch import Tensor

from ..serving.remaining import ProgressText


class NodeProgress:
    """Progress of the running node. The two methods are a HostVAE's `on_frames` and `on_progress`."""

    def __init__(self) -> None:
        self.picture: Image.Image | None = None
        self.text = ProgressText()

    def on_frames(self, frames: Tensor) -> None:
        """Keep the first frame of a segment, for the page."""
        step = max(1, max(frames.shape[3:]) // MAX_PREVIEW_RESOLUTION)  # a mean would take longer, and nobody sees it
        picture = frames[0, :, 0, ::step, ::step].cpu().movedim(0, -1).add(1).mul_(127.5).clamp_(0, 255).byte()
        self.picture = Image.fromarray(picture.numpy())

    def on_progress(self, done: int, total: int) -> None:
        """Move the bar, and show the picture and the time left.

        Raises:
            InterruptProcessingException: ComfyUI's; the user has pressed Cancel.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture, self.picture = self.picture if done else None, None  # one may be left from a run that was cancelled
        preview = picture and ("JPEG", picture, MAX_PREVIEW_RESOLUTION)  # the server scales it to this
        comfy.utils.ProgressBar(total).update_absolute(done, preview=preview)
        if text := self.text.after(done, total):
            show_text(text)


def show_text(text: str) -> None:
    """Show a text on the running node, if there is a page to show it and the server knows how."""
    module = sys.modules.get("server")  # ComfyUI's; it is not there if nodes are used without a server
    server = module and getattr(module.PromptServer, "instance", None)
    if server and server.last_node_id and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, server.last_node_id, server.client_id)
