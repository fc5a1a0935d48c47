"""The KVAE-3D family of video autoencoders: torch and safetensors, nothing else."""

from .config import SEGMENT_FRAMES, KVAEConfig
from .files import WeightsError
from .frames import pad_frames, padded_frames
from .load import load_kvae, save_kvae
from .model import KVAE, Posterior

__all__ = [
    "KVAE",
    "SEGMENT_FRAMES",
    "KVAEConfig",
    "Posterior",
    "WeightsError",
    "load_kvae",
    "pad_frames",
    "padded_frames",
    "save_kvae",
]
