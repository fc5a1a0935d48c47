"""The pipelines of diffusers with tiny random transformers and given embeddings in the place of text encoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import needs

needs.package("transformers", "requirements-dev.txt")
diffusers = needs.package("diffusers", "requirements-dev.txt")

TEXT = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
IMAGE_TOKENS = 729  # of SigLIP


def hunyuan_video(in_channels: int = 16, condition: str | None = None) -> torch.nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=condition,
    )


def hunyuan_video_15(task: str) -> torch.nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
        target_size=32,
        task_type=task,
    )


def kandinsky5(image: bool) -> torch.nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
        visual_cond=image,
    )


def newer_parts() -> dict[str, Any]:
    """What the pipelines of HunyuanVideo 1.5 have beside a transformer. They cannot be built without a VAE."""
    vae = diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(4, 4, 4, 4, 4), layers_per_block=1)
    return {"vae": vae, "guider": diffusers.ClassifierFreeGuidance()}


def text_of_hunyuan_video() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 8, 16), torch.randn(1, 8), torch.ones(1, 8)


def text_of_hunyuan_video_15() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 8, 16), torch.ones(1, 8), torch.randn(1, 4, 8), torch.ones(1, 4)


def text_of_kandinsky5() -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 8, 16), torch.randn(1, 8), torch.tensor([0, 8])


@dataclass(frozen=True)
class Tiny:
    """A pipeline with tiny weights.

    Attributes:
        pipeline: the name of its class.
        text: makes what its `encode_prompt` returns.
        parts: its components that are not models of text.
        missing: its other components: they are None.
        space: of its latents.
        image: whether it starts with a picture.
    """

    pipeline: str
    text: Callable[[], tuple[torch.Tensor, ...]]
    transformer: Callable[[], torch.nn.Module]
    space: str = "hunyuan_video"
    parts: Callable[[], dict[str, Any]] = dict
    missing: tuple[str, ...] = ()
    image: bool = False

    @property
    def type(self) -> Any:
        return getattr(diffusers, self.pipeline)

    def absent(self) -> dict[str, None]:
        return TEXT | dict.fromkeys(self.missing)

    def save(self, folder: Path) -> None:
        """Write the pipeline's folder as it would be downloaded, but without models of text and images.

        HunyuanVideo's VAE is named, but not there: whoever loads it fails.
        """
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
        parts = {"vae": None, "scheduler": scheduler, "transformer": self.transformer().to(torch.bfloat16)}
        self.type(**parts | self.parts(), **self.absent()).save_pretrained(folder)
        index = folder / "model_index.json"
        named = json.loads(index.read_text())
        if named["vae"][0] is None:
            index.write_text(json.dumps(named | {"vae": ["diffusers", "AutoencoderKLHunyuanVideo"]}))

    def without_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let `from_pretrained` accept such a folder, and give the embeddings that the missing models would give."""
        load, text = self.type.from_pretrained, self.text()
        text = tuple(each.bfloat16() if each.is_floating_point() else each for each in text)
        image = torch.randn(1, IMAGE_TOKENS, 16, dtype=torch.bfloat16)
        monkeypatch.setattr(self.type, "from_pretrained", lambda path, **parts: load(path, **self.absent() | parts))
        monkeypatch.setattr(self.type, "encode_prompt", lambda *args, **options: text)
        monkeypatch.setattr(self.type, "encode_image", lambda *args, **options: image, raising=False)


HV, HV15, K5 = text_of_hunyuan_video, text_of_hunyuan_video_15, text_of_kandinsky5
NEWER = {"space": "hunyuan_video_1.5", "parts": newer_parts}
TINY = {
    "hunyuan_video": Tiny("HunyuanVideoPipeline", HV, hunyuan_video),
    "hunyuan_video image": Tiny(
        "HunyuanVideoImageToVideoPipeline",
        HV,
        lambda: hunyuan_video(condition="token_replace"),
        missing=("image_processor",),
        image=True,
    ),
    "hunyuan_video image 33ch": Tiny(
        "HunyuanVideoImageToVideoPipeline",
        HV,
        lambda: hunyuan_video(33, "latent_concat"),
        missing=("image_processor",),
        image=True,
    ),
    "skyreels image": Tiny("HunyuanSkyreelsImageToVideoPipeline", HV, lambda: hunyuan_video(32), image=True),
    "hunyuan_video_15": Tiny("HunyuanVideo15Pipeline", HV15, lambda: hunyuan_video_15("t2v"), **NEWER),
    "hunyuan_video_15 image": Tiny(
        "HunyuanVideo15ImageToVideoPipeline",
        HV15,
        lambda: hunyuan_video_15("i2v"),
        missing=("image_encoder", "feature_extractor"),
        image=True,
        **NEWER,
    ),
    "kandinsky5": Tiny("Kandinsky5T2VPipeline", K5, lambda: kandinsky5(False)),
    "kandinsky5 image": Tiny("Kandinsky5I2VPipeline", K5, lambda: kandinsky5(True), image=True),
}
