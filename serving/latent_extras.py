"""What a latent of ComfyUI holds beside its samples, saved with them: the noise mask and what else a sampler asks for.

| entry | in the file |
|---|---|
| noise_mask | the tensor `noise_mask`; of a mask of several parts `noise_mask_1`, `noise_mask_2` … |
| batch_index | the metadata `kvae_batch_index`: which noise each clip of a batch gets |
| sample_rate | the metadata `kvae_sample_rate`: of the audio that is encoded in a part |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..adapters.checks import check_tensor
from ..kvae.errors import WeightsError
from ..kvae.files import Weights

MASK = "noise_mask"
INDEX, RATE = "kvae_batch_index", "kvae_sample_rate"
MAX_MASKS = 9  # the parts of one
MAX_INDEX = 100_000  # ComfyUI draws the noise of all numbers up to the largest
MAX_RATE = 1_000_000


@dataclass(frozen=True)
class Extras:
    """The entries of a latent beside its samples; empty where it has none.

    Attributes:
        masks: the noise mask, of any shape; of a mask of several parts each, the video's first.
        nested: whether the mask has several parts.
        batch_index: the number of the noise of each clip.
        sample_rate: of the encoded audio, in Hz.

    Raises:
        ValueError: a mask is empty or no dense tensor of floats, there are too many, or a number is out of its range.
    """

    masks: tuple[Tensor, ...] = ()
    nested: bool = False
    batch_index: tuple[int, ...] = ()
    sample_rate: int | None = None

    def __post_init__(self) -> None:
        for mask in self.masks:
            check_tensor(mask, "noise mask")
            if not mask.numel():
                raise ValueError(f"This noise mask is empty, {list(mask.shape)}. Check what made it.")
        if len(self.masks) > (MAX_MASKS if self.nested else 1):
            raise ValueError(f"This noise mask has {len(self.masks)} parts; expected at most {MAX_MASKS}.")
        _check_numbers("batch_index", self.batch_index, 0, MAX_INDEX)
        _check_numbers("sample_rate", [] if self.sample_rate is None else [self.sample_rate], 1, MAX_RATE)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata that hold them in a file."""
        masks = dict(zip(_keys(len(self.masks)) if self.nested else [MASK], self.masks, strict=False))
        texts = {INDEX: list(self.batch_index), RATE: self.sample_rate}
        return masks, {key: json.dumps(value) for key, value in texts.items() if value}

    def about(self) -> list[str]:
        """What a report says of them, one line each."""
        lines = []
        for n, mask in enumerate(self.masks, 1):
            part = f" of part {n}" if self.nested else ""
            low, high = mask.float().aminmax()
            lines.append(f"It has a noise mask{part}, {list(mask.shape)}, from {low:.3f} (kept) to {high:.3f} (new).")
        return lines


def extras_of_file(weights: Weights) -> Extras:
    """The entries in a file.

    Raises:
        WeightsError: they are not as `Extras.to_file` gives them.
    """
    keys = sorted(key for key in weights.shapes if key == MASK or key.startswith(f"{MASK}_"))
    nested = keys != [MASK]
    if nested and keys != _keys(len(keys)):
        raise WeightsError(f"{weights.path}: its noise masks are {', '.join(keys)[:300]}; save the latent again")
    try:
        index, rate = (json.loads(weights.metadata.get(key) or "null") for key in (INDEX, RATE))
        if not isinstance(index, list | None):
            raise ValueError(f"{INDEX} is {index!r:.60}; expected a list of numbers")
        masks = tuple(weights[key] for key in keys[: MAX_MASKS + 1])
        return Extras(masks, nested and bool(keys), tuple(index or ()), rate)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{weights.path}: {error}") from None


def _keys(parts: int) -> list[str]:
    return [f"{MASK}_{n}" for n in range(1, parts + 1)]


def _check_numbers(name: str, numbers: Iterable[object], least: int, most: int) -> None:
    for each in numbers:
        if type(each) is not int or not least <= each <= most:
            raise ValueError(f"{name} holds {each!r:.60}; expected whole numbers from {least} to {most}")


NONE = Extras()
