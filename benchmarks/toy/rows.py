"""The ways to train the LoRA that the bench compares. What a row does not name is as in the product.

# λ weight of the identity loss; K frames that it looks at; d the deep step
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        weight: λ of the identity loss.
        appearance: weight of the appearance loss.
        mask: of the subject in the first frame, for the appearance loss; see `masks.mask_of`.
        videos: flow matching on true clips, in the place of all other losses.
        schedule: of both weights, see `identity_weight`.
        tail: distilled steps below d.
        noise: at most, in the pictures that the head was trained on.
        backbone_noise: the same for what stands for DINOv3.
        stills: how many there are in all, each of another sprite; 0: new ones in every step.
        rank, frames: of the LoRA; K.
        scale: by which the decoded latents are made smaller.
        steps: of the optimiser.
        fault: one of FAULTS, or none.
    """

    weight: float = 0.15
    appearance: float = 0.0
    mask: str = "features"
    videos: bool = False
    schedule: str = "linear"
    tail: int = 1
    noise: float = 0.1
    backbone_noise: float = 0.1
    stills: int = 0
    rank: int = 16
    frames: int = 5
    scale: float = 1.0
    steps: int = 250
    fault: str = ""

    @property
    def unit(self) -> float:
        """The weight that follows the schedule; both weights are multiples of it."""
        return self.weight or self.appearance


FAULTS = {
    "interleaved": "conditions in another order than the student's steps",
    "anew": "a generator made anew for each sample: only the rarest identity is ever accepted",
    "timesteps": "the scheduler's own noise levels in training",
    "bfloat16": "the LoRA's weights in bfloat16",
    "scale": "alpha 16 read beside rank 8: at twice its scale when it is used",
    "forgets": "momentum lost at a resume, every 25 steps",
}
OURS = Row()
PUBLISHED = Row(weight=0.6, schedule="constant", tail=0, noise=0.0)
ALONE = 1e6  # λ beside which the distillation is nothing
MAIN = {
    "real videos": Row(videos=True),
    "ours": OURS,
    "appearance 3, no head": replace(OURS, weight=0.0, appearance=3.0),
    "published settings": PUBLISHED,
    "without distillation, 150 steps": replace(OURS, weight=ALONE, steps=150),
    "without identity loss, 20 steps": replace(OURS, weight=0.0, steps=20),  # nothing moves: B stays 0
}
PARTS = {
    "λ 0.6": replace(OURS, weight=0.6),
    "λ 0.3": replace(OURS, weight=0.3),
    "λ 0.05": replace(OURS, weight=0.05),
    "no tail": replace(OURS, tail=0),
    "tail 2": replace(OURS, tail=2),
    "head without noise": replace(OURS, noise=0.0),
    "backbone without noise": replace(OURS, backbone_noise=0.0),
    "both without noise": replace(OURS, noise=0.0, backbone_noise=0.0),
    "noise 0.3": replace(OURS, noise=0.3, backbone_noise=0.3),
    "λ 0.15 alone": replace(OURS, tail=0, noise=0.0),
    "rank 4": replace(OURS, rank=4),
    "rank 1": replace(OURS, rank=1),
    "500 steps": replace(OURS, steps=500),
    "500 steps, λ 0.3": replace(OURS, steps=500, weight=0.3),
    "K 1": replace(OURS, frames=1),
    "decode at half size": replace(OURS, scale=0.5),
}
STILLS = {f"{count} stills": replace(OURS, stills=count) for count in (6, 12, 30, 100)}
FAULTY = {f"fault: {name}": replace(OURS, fault=name) for name in FAULTS}
APPEARANCES = {
    f"appearance 3, no head, {name}": replace(OURS, weight=0.0, appearance=3.0, mask=mask)
    for mask, name in (
        ("true", "true mask"),
        ("border", "mask by the border's colour"),
        ("box", "a box"),
        ("all", "no mask"),
    )
} | {
    "appearance 0.75, no head": replace(OURS, weight=0.0, appearance=0.75),
    "appearance 7.5, no head": replace(OURS, weight=0.0, appearance=7.5),
    "appearance 3, and the head": replace(OURS, appearance=3.0),
}
GROUPS = {"main": MAIN, "parts": PARTS, "stills": STILLS, "faults": FAULTY, "appearance": APPEARANCES}
