"""The published models on the Hugging Face hub: their ids, the names of their files, and the hub's client."""

from __future__ import annotations

import os
import re
from typing import Any

from .errors import WeightsError

HUB_IDS = {name: f"kandinskylab/{name}" for name in ("KVAE-3D-1.0", "KVAE-3D-2.0-t4s8", "KVAE-3D-2.0-t4s16")}
WEIGHTS_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # in the official layout, in diffusers'


def hub_address(model: str) -> str:
    """The address from which a browser downloads a published model's weights."""
    return f"https://huggingface.co/{HUB_IDS[model]}/resolve/main/{WEIGHTS_FILES[0]}"


def may_be_hub_id(name: str) -> bool:
    """Whether a name is `owner/name`, and no path of another form: only such a name is looked up on the hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def hub_client() -> Any:
    """Import huggingface_hub, which only downloads need. It reads its environment variables at import.

    Raises:
        WeightsError: huggingface_hub is not installed, or rejects an environment variable.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils  # noqa: F401
    except ImportError:
        raise WeightsError(
            "downloads need the package huggingface_hub; install it, or download the file in a browser"
        ) from None
    except ValueError as error:
        raise WeightsError(f"huggingface_hub rejects an environment variable HF_…: {hub_reason(error)}") from None
    return huggingface_hub


def hub_reason(error: Exception) -> str:
    """The first line of an error that huggingface_hub or its HTTP library raised."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"{reason} (HF_ENDPOINT is set)" if os.environ.get("HF_ENDPOINT") else reason
