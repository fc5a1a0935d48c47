"""Read HunyuanVideo 1.5's image-to-video pipeline, and refuse what a LoRA cannot be trained on without videos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...kvae.foreign import parse_object
from ...kvae.hub import may_be_hub_id
from ...kvae.paths import read_text
from ..errors import UserError
from .quiet import quiet

SIZES = "pipeline_sizes.json"  # of a tiny pipeline, beside model_index.json: what diffusers keeps in no config


def load_pipeline(name: str | Path, **options: Any) -> Any:
    """Read an image-to-video pipeline of HunyuanVideo 1.5.

    Args:
        name: a folder, or a hub id.
        options: of `from_pretrained`, such as dtype, or transformer=None for a pipeline without it.
    """
    from diffusers import HunyuanVideo15ImageToVideoPipeline

    pipe = HunyuanVideo15ImageToVideoPipeline.from_pretrained(name, **options)
    sizes = Path(name) / SIZES
    if sizes.is_file():
        set_sizes(pipe, parse_object(read_text(sizes)))
    return pipe


def set_sizes(pipe: Any, sizes: dict[str, Any]) -> None:
    """Set attributes of a pipeline: diffusers writes them into no config, so a loaded pipeline has those of 8 B."""
    for name, value in sizes.items():
        setattr(pipe, name, value)


def load_encoders(name: str, device: str, dtype: torch.dtype) -> Any:
    """The pipeline without its network, frozen, for `encode_text` and `encode_picture`.

    Raises:
        UserError: diffusers or transformers is not installed, there is no such pipeline, or its network cannot be
            trained so (`check_base`).
    """
    config = load_config(name)
    with _reading(name):
        pipe = load_pipeline(name, transformer=None, dtype=dtype)
        if not pipe.tokenizer.chat_template:  # transformers makes an empty tokenizer where its files are missing
            raise ValueError("no chat template in its tokenizer")
    pipe.target_size = config["target_size"]  # the pipeline reads it from the network
    return pipe.to(device)


def load_whole(name: str, dtype: torch.dtype) -> Any:
    """The whole pipeline, frozen, on the CPU.

    Raises:
        UserError: as `load_encoders`.
    """
    load_config(name)
    with _reading(name):
        pipe = load_pipeline(name, dtype=dtype)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe


def load_config(name: str) -> dict[str, Any]:
    """The config of the pipeline's network.

    Raises:
        UserError: as `load_encoders`.
    """
    with _reading(name):
        from diffusers import HunyuanVideo15Transformer3DModel

        config = dict(HunyuanVideo15Transformer3DModel.load_config(name, subfolder="transformer"))
        check_base(name, config)
    return config


def load_transformer(name: str, dtype: torch.dtype) -> Any:
    """The pipeline's network, frozen, on the CPU. Of each block, only the input is kept for gradients.

    Raises:
        UserError: as `load_encoders`.
    """
    with _reading(name):
        from diffusers import HunyuanVideo15Transformer3DModel

        transformer: Any = HunyuanVideo15Transformer3DModel.from_pretrained(
            name, subfolder="transformer", torch_dtype=dtype
        )
    transformer.enable_gradient_checkpointing()
    return transformer.requires_grad_(False)


def load_vae(name: str, dtype: torch.dtype) -> Any:
    """The pipeline's VAE, frozen, on the CPU.

    Raises:
        UserError: as `load_encoders`.
    """
    with _reading(name):
        from diffusers import AutoencoderKLHunyuanVideo15

        vae: Any = AutoencoderKLHunyuanVideo15.from_pretrained(name, subfolder="vae", torch_dtype=dtype)
    return vae.requires_grad_(False)


def load_vae_config(name: str) -> dict[str, Any]:
    """The config of the pipeline's VAE.

    Raises:
        UserError: as `load_encoders`.
    """
    with _reading(name):
        from diffusers import AutoencoderKLHunyuanVideo15

        return dict(AutoencoderKLHunyuanVideo15.load_config(name, subfolder="vae"))


def load_shift(name: str) -> float:
    """The shift of the noise levels, by the pipeline's scheduler.

    Raises:
        UserError: as `load_encoders`.
    """
    with _reading(name):
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = dict(FlowMatchEulerDiscreteScheduler.load_config(name, subfolder="scheduler"))
        if config.get("use_dynamic_shifting"):
            raise ValueError("its scheduler shifts dynamically, which HunyuanVideo 1.5 does not")
        return float(config["shift"])


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """A context in which diffusers and transformers are quiet, and whatever fails within them is one line."""
    try:
        if not Path(name).is_dir() and not may_be_hub_id(name):
            raise FileNotFoundError("no such folder")
        with quiet():
            yield
    except (UserError, MemoryError):
        raise
    except ImportError:
        raise UserError(
            "diffusers or transformers is missing or too old: pip install -r requirements-vfl.txt"
        ) from None
    except Exception as error:  # diffusers and transformers check little, so a folder can fail anywhere within them
        line = (str(error) or type(error).__name__).splitlines()[0].strip()
        raise UserError(
            f"{name}: no pipeline of HunyuanVideo 1.5 can be read there ({line}); expected a folder, or a hub id "
            "(owner/name)"
        ) from None


def check_base(name: str, config: Any) -> None:
    """Refuse a network on which a LoRA cannot be trained without videos.

    Raises:
        UserError: it is MeanFlow (step-distilled), or no image-to-video network.
    """
    if config.get("use_meanflow"):
        raise UserError(
            f"{name} is step-distilled (MeanFlow); expected 480p_i2v, 720p_i2v or one that is distilled only"
        )
    if config.get("task_type") != "i2v":
        raise UserError(f"{name} is a network for {config.get('task_type')}; expected image-to-video (i2v)")
