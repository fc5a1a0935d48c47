"""Who is in a picture, as a unit vector: a frozen DINOv3, and on it a small head that was trained for such characters.

    backbone = load_backbone("dinov3-vitb16", "cuda")
    embedder = Embedder(backbone, load_head("head.safetensors", backbone)[0]).to("cuda")
    anchor = embedder(picture)
    loss = identity_loss(embedder, decode(z), draw_frames(Draws(seed, "frames", k), 17, 5), anchor)

# B pictures or clips, T frames, K of them, H/W pixels; D width of DINOv3, E of the embedding
p_B3HW, y_B3THW pixels in 0..1, floating, of any size; x_BD features; e_BE unit vectors
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .draws import Draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by which DINOv3 was trained
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
# Of the frames after the first, in percent. Each bucket gives one frame; the last makes the near frames count twice.
BUCKETS = ((0, 10), (10, 30), (30, 60), (60, 100), (0, 20))


class Head(nn.Module):
    """[Linear, LayerNorm, activation, Dropout]* Linear, and a unit length, in float32.

    Args:
        dims: D, the widths between, and E.

    Attributes:
        net: layers whose numbers do not depend on the dropout, as it is always among them.
    """

    def __init__(
        self, dims: Sequence[int], activation: str = "gelu", layernorm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dims, self.activation = tuple(dims), activation
        self.layernorm = layernorm and len(dims) > 2  # a single layer has no place for it, and is read without
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(dims)):
            if i:
                layers += [nn.LayerNorm(before)] if layernorm else []
                layers += [ACTIVATIONS[activation](), nn.Dropout(dropout)]
            layers.append(nn.Linear(before, after))
        self.net = nn.Sequential(*layers)

    def forward(self, x_BD: Tensor) -> Tensor:
        """x_BD → e_BE."""
        return F.normalize(self.net(x_BD.float()), dim=-1)


class Backbone(nn.Module):
    """A frozen DINOv3, whose gradients reach the pictures only.

    Args:
        model: a DINOv3ViTModel.
        name: folder or hub id, as the user gave it.
        digest: SHA-256 hash of its weights.

    Attributes:
        width: D.
        side: pixels of the square that every picture is resized to.
    """

    def __init__(self, model: Any, name: str, digest: str):
        super().__init__()
        self.model, self.name, self.digest = model.eval().requires_grad_(False), name, digest
        self.width: int = model.config.hidden_size
        self.side: int = model.config.image_size  # 224 in all that are published
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, p_B3HW: Tensor) -> Tensor:
        """p_B3HW → x_BD in float32."""
        return self._seen(p_B3HW).pooler_output.float()

    def patches(self, p_B3HW: Tensor) -> Tensor:
        """p_B3HW → the states of the patches, x_BDhw in float32."""
        config, cells = self.model.config, self.side // self.model.config.patch_size
        states = self._seen(p_B3HW).last_hidden_state[:, 1 + config.num_register_tokens :]
        return states.float().unflatten(1, (cells, cells)).movedim(3, 1)

    def _seen(self, p_B3HW: Tensor) -> Any:
        mean, std = self.get_buffer("mean").float(), self.get_buffer("std").float()
        p = (resized(p_B3HW.float(), self.side) - mean) / std
        return self.model(p.to(self.model.dtype))

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: in the other, DINOv3 moves its positions at random."""
        return super().train(False)


class Embedder(nn.Module):
    """Pictures → embeddings. Both parts are frozen, and only the pictures get gradients."""

    def __init__(self, backbone: Backbone, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head.eval().requires_grad_(False)

    def forward(self, p_B3HW: Tensor) -> Tensor:
        """p_B3HW → e_BE."""
        return self.head(self.backbone(p_B3HW))


def resized(p_B3HW: Tensor, side: int) -> Tensor:
    """Squares of this side, without cropping. Both sides of a comparison must come through here."""
    if p_B3HW.shape[-2:] == (side, side):
        return p_B3HW
    return F.interpolate(p_B3HW, (side, side), mode="bilinear", antialias=True, align_corners=False)


def draw_frames(draws: Draws, frames: int, count: int) -> list[int]:
    """The frames of a clip that the identity loss looks at, sorted: never the first, which is given; none twice.

    One comes from each of BUCKETS, in random order, as far as `count` goes; any further ones from anywhere.

    Args:
        frames: T. Of a single picture, the answer is that picture.
        count: K; T − 1 or more means all.
    """
    after = frames - 1
    if after <= count:
        return list(range(1, frames)) or [0]
    found: set[int] = set()
    for bucket, _ in zip(draws.shuffled(len(BUCKETS)), range(count), strict=False):
        low, high = (share * after // 100 for share in BUCKETS[bucket])
        free = [i for i in range(low, max(high, low + 1)) if i not in found]
        if free:
            found.add(free[draws.below(len(free))])
    rest = [i for i in range(after) if i not in found]
    found |= {rest[i] for i, _ in zip(draws.shuffled(len(rest)), range(count - len(found)), strict=False)}
    return [1 + i for i in sorted(found)]


def identity_loss(embedder: nn.Module, y_B3THW: Tensor, frames: Sequence[int], anchor_BE: Tensor) -> Tensor:
    """1 − the cosine between each of these frames and the picture of the character, on average.

    Args:
        anchor_BE: the embeddings of the pictures, framed as the clips are.
    """
    chosen = y_B3THW[:, :, list(frames)].transpose(1, 2)
    e_BKE = embedder(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])
    return 1 - (e_BKE * anchor_BE[:, None]).sum(-1).mean()
