"""All that a training of a LoRA needs, tiny: base, DINOv3, data set, cache, head, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import needs
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.vfl.backbone import load_backbone
from kvae_comfyui.training.vfl.head_files import made_for, save_head
from kvae_comfyui.training.vfl.identity import Head
from kvae_comfyui.training.vfl.tiny import BACKBONE_WIDTH, save_tiny
from vfl_characters import make_characters, save_dinov3

BANK = {"template": '{character} says "{word}".', "character": ["A cat", "A dog that runs"], "word": ["hello", "no"]}


def make_job(root: Path, identities: int = 2, pictures: int = 3) -> Path:
    """A folder with base, dinov3, set, cache, head.safetensors and bank.json."""
    needs.package("peft", "requirements-vfl.txt")
    save_tiny(root / "base")
    make_characters(root / "set", identities, pictures)
    save_dinov3(root / "dinov3")
    (root / "bank.json").write_text(json.dumps(BANK))
    torch.manual_seed(0)
    backbone = load_backbone(str(root / "dinov3"), "cpu")
    save_head(root / "head.safetensors", Head((BACKBONE_WIDTH, 16, 8)), made_for(backbone, {}, {}))
    options = {"base": "base", "data-root": "set", "cache-root": "cache", "prompts": "bank.json"}
    argv = [f"--{name}={root / place}" for name, place in options.items()]
    assert main(["vfl-cache", *argv, "--device=cpu", "--crops-per-picture=2"]) == 0
    return root


def train_options(job: Path, out: Path, *more: str, steps: int = 4) -> list[str]:
    """The command vfl-train on a job: clips of 5 frames, a path of 6 steps, a strong identity loss."""
    places = {"base": "base", "data-root": "set", "cache-root": "cache", "prompts": "bank.json", "backbone": "dinov3"}
    return [
        *("vfl-train", *(f"--{name}={job / place}" for name, place in places.items())),
        *(f"--head={job / 'head.safetensors'}", f"--output-root={out}", "--device=cpu", "--frames=5"),
        *("--path-steps=6", "--rank=4", "--alpha=4", "--lr=1e-2", f"--steps={steps}", "--warmup=2"),
        *("--identity-warmup=2", "--identity-weight=5", "--p-secondary=0.5", "--val-every=2", "--val-samples=1", *more),
    ]  # fmt: skip
