"""Who is in a picture of the toy: a small DINOv3, and on it a head by the product's `vfl-pack` and `vfl-head`.

    embed = embedder(work, noise=0.1, backbone_noise=0.1)       # trained once, then read

A real DINOv3 has seen the world before. This one has seen sprites of all colours, by the head trainer's own loss.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from kvae_comfyui.benchmarks.toy.world import NEW, SIDE, Sprites, sprites
from kvae_comfyui.kvae.files import Weights, save_weights
from kvae_comfyui.training.vfl import head, pack
from kvae_comfyui.training.vfl.contrast import supcon
from kvae_comfyui.training.vfl.draws import Draws
from kvae_comfyui.training.vfl.head_files import load_head
from kvae_comfyui.training.vfl.identity import Backbone, Embedder

WIDTH, PATCH = 48, 2
BACKBONE_STEPS, HEAD_STEPS = 600, 500
IDENTITIES, PICTURES = 300, 8  # that the head learns from
BATCH, EACH, TEMPERATURE = 32, 2, 0.1  # as in `vfl-head`


def embedder(work: Path, noise: float, backbone_noise: float) -> Embedder:
    """The embedder whose parts have seen noise of up to these standard deviations, in pixels of 0..1."""
    backbone = trained_backbone(work, backbone_noise)
    data, out = work / "dataset", work / f"head-{noise:g}-on-{backbone_noise:g}"
    file = out / "head.safetensors"
    if not file.exists() or (out / "head.resume.safetensors").exists():
        write_pictures(work / "pictures")
        pack.run(pack.VflPackConfig(str(data), str(work / "pictures"), val_share=0.25))
        options: dict[str, Any] = {"dims": "64,32", "identities": BATCH, "pictures": EACH, "steps": HEAD_STEPS}
        head.run(head.VflHeadConfig(str(data), backbone.name, str(out), noise=noise, device="cpu", **options), backbone)
    return Embedder(backbone, load_head(file, backbone)[0])


def new_backbone() -> Any:
    """DINOv3ViTModel with random weights."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    shape: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": PATCH, "image_size": SIDE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DINOv3ViTModel(DINOv3ViTConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, **shape))


def trained_backbone(work: Path, noise: float) -> Backbone:
    """The backbone, from its file in `work`, or trained now."""
    model, file = new_backbone(), work / f"backbone-{noise:g}.safetensors"
    if not file.exists():
        train_backbone(model, noise)
        save_weights(file, model.state_dict(), {})
    saved = Weights(file)
    model.load_state_dict({key: saved[key].clone() for key in saved.shapes})
    return Backbone(model, "toy", hashlib.sha256(file.read_bytes()).hexdigest())


def train_backbone(model: Any, noise: float) -> None:
    """Supervised contrastive loss on pictures of new sprites, each at two places before two backgrounds."""
    backbone = Backbone(model, "toy", "")
    model.requires_grad_(True)
    rates = {"max_lr": 2e-3, "total_steps": BACKBONE_STEPS, "pct_start": 0.1}
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, **rates)  # type: ignore[arg-type]
    who = torch.arange(BATCH).repeat(EACH)
    for step in tqdm(range(BACKBONE_STEPS), desc="backbone"):
        seen = sprites(BATCH, NEW, Draws(0, "backbone", step))
        p = torch.cat([first_frames(seen.elsewhere(Draws(0, "place", step, i))) for i in range(EACH)])
        generator = torch.Generator().manual_seed(Draws(0, "noise", step).bits())
        level = noise * torch.rand(len(p), 1, 1, 1, generator=generator)
        p = (p + level * torch.randn(p.shape, generator=generator)).clamp(0, 1)
        supcon(torch.nn.functional.normalize(backbone(p), dim=1), who, TEMPERATURE).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()


def first_frames(seen: Sprites) -> Tensor:
    """p_B3HW."""
    return seen.clips()[:, :, 0]


def write_pictures(folder: Path) -> None:
    """A folder of PNG files for each identity, as a user has them."""
    seen = sprites(IDENTITIES, NEW, Draws(0, "identities"))
    for j in range(PICTURES):
        pictures = (first_frames(seen.elsewhere(Draws(0, "picture", j))) * 255).round().byte()
        for i, picture in enumerate(pictures.permute(0, 2, 3, 1)):
            file = folder / f"{i:03}" / f"{j}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).save(file)
