"""The KVAE-3D family of video autoencoders: torch and safetensors, nothing else."""

from .config import FAMILY, SEGMENT_FRAMES, KVAEConfig
from .engine.plan import BudgetError, Plan, plan_decode, plan_encode
from .engine.strips import Execution, Norms
from .files import WeightsError
from .frames import pad_frames, padded_frames
from .load import load_kvae, save_kvae
from .model import KVAE, Posterior

__all__ = [
    "FAMILY",
    "KVAE",
    "SEGMENT_FRAMES",
    "BudgetError",
    "Execution",
    "KVAEConfig",
    "Norms",
    "Plan",
    "Posterior",
    "WeightsError",
    "load_kvae",
    "pad_frames",
    "padded_frames",
    "plan_decode",
    "plan_encode",
    "save_kvae",
]
