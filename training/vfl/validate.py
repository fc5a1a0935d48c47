"""Validate a Video-Free LoRA: the same pictures, prompts, noise and steps each time, student and base on the same.

    found = validate(training, samples)
    print(line(step, found))

Identity up and motion near that of the base is the goal. The identity loss can be fooled, so a second answer comes from
features that it does not see: of DINOv3 without the head, or of another backbone.

# B = 1; x_Bcthw scaled latents, y_B3THW pixels in 0..1, p_B3HW a picture in 0..1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.processes import Processes
from .conditions import Conditions, flow
from .decoders import Decode, smaller
from .lora import base_of
from .path import Drawn, Kept, clean, rollout
from .step import Recipe

STILL, RESTLESS = 0.8, 1.25  # motion of the student as a share of the base's, outside of which a warning is printed
DRIFT = 0.002  # L_distill / mean v_T² above which λ should be lowered
BORDER = 8  # a strip of one eighth of the picture's sides
FRAMES = 8  # that are judged at a time

Judge = Callable[[Tensor], Tensor]  # p_B3HW → features [B, D]


class ValSample(NamedTuple):
    """A sample of the split val.

    Attributes:
        given: conditions of the whole picture, without a crop, and of a prompt.
        noise: x_Bcthw, float32, from `noise(seed, k, shape)`.
        picture: p_B3HW, the primary anchor, framed as the clip is.
    """

    given: Conditions
    noise: Tensor
    picture: Tensor


class Validated(Protocol):
    """What `validate` asks of a training.

    Attributes:
        processes: that share the samples.
        transformer: the network, with the LoRA.
        recipe: for its noise levels and its band.
        config: for `decode_scale`, the size in which clips are decoded, as in training: more might not fit.
        decode: scaled latents → pixels.
        embed: p_B3HW → e_BE, by which the LoRA is trained.
        second: p_B3HW → features [B, D] that the loss does not see, such as a `Backbone`.
    """

    @property
    def processes(self) -> Processes: ...
    @property
    def transformer(self) -> Any: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def config(self) -> Any: ...
    @property
    def decode(self) -> Decode: ...
    @property
    def embed(self) -> Judge: ...
    @property
    def second(self) -> Judge: ...


def fixed_steps(recipe: Recipe) -> Drawn:
    """The steps that validation looks at: the deep one in the middle of its band, those before it without jitter, and
    one after it if the recipe has such."""
    last, deep = len(recipe.sigma) - 2, sum(recipe.band) // 2
    before = {round(0.5 * m / recipe.law.count * last) for m in range(1, recipe.law.count + 1)}
    after = {(deep + 1 + last) // 2} if recipe.law.tail and deep < last else set()
    return Drawn(tuple(sorted({i for i in before if i < deep} | {deep} | after)), deep)


@torch.no_grad()
def validate(training: Validated, samples: Sequence[ValSample]) -> dict[str, float]:
    """Compare student and base. All processes take the same number of passes, as a base in parts needs it.

    Args:
        samples: all of them, in each process; each process computes its share.

    Returns:
        The means over all samples, in each process: `distill`, `flow`, and `drift`, their ratio; `identity` and
        `base_identity`, cosines with the picture by `embed`, and `identity_std`; `second`, `base_second`: by `second`;
        `motion`, `base_motion`: mean |y_{f+1} − y_f|, and `motion_ratio`; `change`: mean |y_student − y_base|, and
        `border_change`: along the sides of the picture, where the subject seldom is.
    """
    processes, mine = training.processes, []
    for first in range(0, len(samples), processes.count):
        number = first + processes.rank
        row = _compare(training, samples[min(number, len(samples) - 1)])  # one too many, rather than one pass less
        if number < len(samples):
            mine.append((number, row))
    rows = [each for _, each in sorted(chain.from_iterable(processes.gather(mine)), key=itemgetter(0))]
    every = {name: torch.tensor([value for each in rows for value in each[name]]) for name in rows[0]}
    found = {name: values.mean().item() for name, values in every.items()}
    return found | {
        "identity_std": every["identity"].std(correction=0).item(),
        "drift": found["distill"] / max(found["flow"], 1e-12),
        "motion_ratio": found["motion"] / max(found["base_motion"], 1e-12),
    }


def _compare(training: Validated, sample: ValSample) -> dict[str, list[float]]:
    """The figures of one sample: one of each kind, or one for each frame."""
    recipe, network = training.recipe, training.transformer
    drawn, device = fixed_steps(recipe), sample.given.latent.device

    def velocity(x_Bcthw: Tensor, i: int) -> Tensor:
        return flow(network, sample.given, x_Bcthw, recipe.sigma[i])

    with base_of(network):
        kept = rollout(lambda x, i: (velocity(x, i),) * 2, sample.noise.to(device), recipe.sigma, drawn.indices)
    students = [velocity(each.x, each.index).float() for each in kept]
    clips = _clips(training, kept, students, drawn.deep)
    picture = F.interpolate(sample.picture.to(device), clips[0].shape[-2:], mode="area")
    found = {
        "distill": [(v - each.v).square().mean().item() for v, each in zip(students, kept, strict=True)],
        "flow": [each.v.square().mean().item() for each in kept],
    }
    for prefix, y in zip(("", "base_"), clips, strict=True):
        found[f"{prefix}identity"] = _cosines(training.embed, y, picture)
        found[f"{prefix}second"] = _cosines(training.second, y, picture)
        found[f"{prefix}motion"] = [y.diff(dim=2).abs().mean().item()]
    change_HW = (clips[0] - clips[1]).abs().mean((0, 1, 2))
    return found | {"change": [change_HW.mean().item()], "border_change": [change_HW[_border(change_HW)].mean().item()]}


def _clips(training: Validated, kept: Sequence[Kept], students: Sequence[Tensor], deep: int) -> list[Tensor]:
    """The clips that student and base foresee at the deep step, y_B3THW."""
    at = next(i for i, each in enumerate(kept) if each.index == deep)
    level = training.recipe.sigma[deep]
    estimates = [clean(kept[at].x, v, level) for v in (students[at], kept[at].v)]
    return [training.decode(smaller(z, scale=training.config.decode_scale)) for z in estimates]


def _cosines(judge: Judge, y_B3THW: Tensor, p_B3HW: Tensor) -> list[float]:
    """Of each frame after the first, which is given, with the picture."""
    frames = y_B3THW[0, :, 1:].transpose(0, 1)
    anchor = F.normalize(judge(p_B3HW).float(), dim=-1)
    return [
        cosine
        for part in frames.split(FRAMES)
        for cosine in (F.normalize(judge(part).float(), dim=-1) @ anchor[0]).tolist()
    ]


def _border(picture_HW: Tensor) -> Tensor:
    """Whether a pixel is near a side."""
    height, width = picture_HW.shape
    y, x = -(-height // BORDER), -(-width // BORDER)
    mask = torch.ones_like(picture_HW, dtype=torch.bool)
    mask[y : height - y, x : width - x] = False
    return mask


def line(step: int, found: dict[str, float]) -> str:
    """What a validation found, for the terminal, with warnings."""
    said = (
        f"  step {step}: identity {found['identity']:.3f} ± {found['identity_std']:.3f} (base "
        f"{found['base_identity']:.3f}), by the second judge {found['second']:.3f} ({found['base_second']:.3f}), "
        f"motion {found['motion_ratio']:.2f} of the base's, change {255 * found['change']:.2f} of 255, at the border "
        f"{255 * found['border_change']:.2f}, distillation {found['drift']:.3%} of the flow"
    )
    if found["motion_ratio"] < STILL:
        said += "; WARNING: it moves less than the base: lower --identity-weight"
    if found["motion_ratio"] > RESTLESS:
        said += "; WARNING: it flickers or moves more than the base: lower --identity-weight or --lr"
    if found["drift"] > DRIFT:
        said += f"; WARNING: more than {DRIFT:.1%} off the base: lower --identity-weight"
    return said
