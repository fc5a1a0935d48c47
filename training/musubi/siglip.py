"""SigLIP's view of a frame, which HunyuanVideo 1.5 is given to make a video from an image.

The library transformers is needed for this only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kvae import WeightsError
from ...kvae.files import Weights
from ..errors import UserError

# sigclip_vision_patch14_384, of which ComfyUI and musubi-tuner use one file without a config
CONFIG: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
}


class Siglip:
    """A SigLIP vision model.

    Args:
        path: a folder, also one with a folder image_encoder in it, or a .safetensors file.

    Raises:
        UserError: transformers is not installed, or the model cannot be read.
        WeightsError: the file is not a safetensors file.
    """

    def __init__(self, path: str, device: str):
        try:
            from transformers import SiglipImageProcessor, SiglipVisionModel
        except ImportError:
            raise UserError("--i2v needs transformers, which is not installed: pip install transformers") from None
        # on a CPU, half precision is slow and needs no less time to load
        self.dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        try:
            model: Any = _from_folder(SiglipVisionModel, Path(path)) if Path(path).is_dir() else _from_file(Path(path))
        except WeightsError:
            raise
        except Exception as error:  # transformers checks little, so a folder can fail anywhere within it
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"--image-encoder {path}: not a SigLIP vision model ({line})") from None
        self.model = model.to(device, self.dtype).eval()
        side = model.config.image_size
        half = [0.5, 0.5, 0.5]
        self.processor = SiglipImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half)

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] → the last hidden state, [patches, channels]."""
        seen = self.processor.preprocess(images=frame, return_tensors="pt")["pixel_values"]
        return self.model(pixel_values=seen.to(self.model.device, self.dtype)).last_hidden_state[0]


def _from_folder(model: Any, folder: Path) -> Any:
    inner = folder / "image_encoder"
    return model.from_pretrained(inner if inner.is_dir() else folder, local_files_only=True, use_safetensors=True)


def _from_file(path: Path) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    weights = Weights(path)
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionConfig(**CONFIG))
    model.load_state_dict({key: weights[key] for key in weights.shapes}, assign=True)
    return model
