"""The KVAE-3D family of video autoencoders. It needs torch and safetensors, nothing else."""

from .config import FAMILY, SEGMENT_FRAMES, KVAEConfig
from .engine.execution import Execution, Recompute
from .engine.plan import BudgetError, Plan, plan_decode, plan_encode
from .engine.stream_state import GroupNormStats
from .errors import WeightsError
from .frames import pad_frames, padded_frames
from .load import load_kvae, save_kvae
from .model import KVAE
from .posterior import Posterior

__all__ = [
    "FAMILY",
    "KVAE",
    "SEGMENT_FRAMES",
    "BudgetError",
    "Execution",
    "GroupNormStats",
    "KVAEConfig",
    "Plan",
    "Posterior",
    "Recompute",
    "WeightsError",
    "load_kvae",
    "pad_frames",
    "padded_frames",
    "plan_decode",
    "plan_encode",
    "save_kvae",
]
