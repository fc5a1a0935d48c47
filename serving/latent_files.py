"""Read latent files of ComfyUI, musubi-tuner, diffusers and Kandinsky 5 as raw latents [B, c, t, h, w].

| file | recognised by | layout | values |
|---|---|---|---|
| ComfyUI .latent | `latent_tensor` | [B, c, t, h, w] | raw |
| musubi-tuner, latent output | `latent` | [c, t, h, w], also with a batch | scaled |
| musubi-tuner, latent cache | `latents_{t}x{h}x{w}_{dtype}`, `architecture` | [c, t, h, w] | see architectures.py |
| diffusers, output_type="latent" | the only tensor | [B, c, t, h, w]; for Kandinsky 5 [B, t, h, w, c] | scaled |
| Kandinsky 5's own code | the only tensor | [t, h, w, c] | scaled |

The metadata decide first, then the key, then the shape. If two readings remain, an error asks the user. Metadata that
decide: `kvae_space`, `kvae_weights` (JSON) and `kvae_frames`, which this project writes into files of all kinds, and
musubi-tuner's `architecture`, `frame_count` and `video_length`.

`latent_writers` describes the files that this project writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..adapters.checks import DTYPES, check_finite, check_values
from ..adapters.spaces import SPACES, LatentSpace, fitting_spaces
from ..adapters.weights import VAEWeights
from ..kvae.errors import WeightsError
from ..kvae.files import Weights
from ..kvae.foreign import build, parse_object
from .architectures import KANDINSKY, MODELS
from .latent_extras import NONE, Extras, extras_of_file
from .latent_kinds import COUNT, Kind, kind_of

MAX_PARTS = 9  # of one latent; those of video with audio have two

_CHANNELS = {space.channels for space in SPACES.values()}
_IMAGE_CHANNELS = {4, 16}  # of image latents: Stable Diffusion's; Flux's and Stable Diffusion 3's
_OLD_COMFYUI_SCALE = 0.18215  # ComfyUI files without `latent_format_version_0` hold Stable Diffusion's scaled latents


@dataclass(frozen=True)
class LatentFile:
    """A raw latent and what its file says of it.

    Attributes:
        z: [B, c, t, h, w], raw; an image latent keeps its 4 dimensions. A ComfyUI latent keeps its dtype, all others,
            and float8, are float32.
        kind: the kind of file.
        space: the name of the latent's space, if the file or the user names it, or its scale tells.
        frames: the frames of the clip, if the file says. A number that does not fit the latent is of no use: see
            `clips.frames_to_keep`.
        others: the parts after the first, such as audio, exactly as they were saved.
        extras: what comes with the samples of a ComfyUI latent, such as a noise mask.
        weights: of the VAE of that space that the latent is of, if the file says.
    """

    z: Tensor
    kind: str
    space: str | None = None
    frames: int | None = None
    others: tuple[Tensor, ...] = ()
    extras: Extras = NONE
    weights: VAEWeights | None = None


def load_latent(path: str | os.PathLike, scaled: bool | None = None, model: str | None = None) -> LatentFile:
    """Read a latent file of any kind in the table above.

    Args:
        scaled: whether the values are scaled, as inside a sampler, not raw. None: the kind of file decides.
        model: the model of the latent, one of `MODELS`. None: the file or its shape decides.

    Parts after the first have no scale that this project knows: they stay as they are in the file.

    Raises:
        WeightsError: not a latent file, a pickle, damaged, without one of its parts, of an unknown model, or readable
            in two ways; the message says which argument decides.
    """
    if model not in (None, *MODELS):
        raise WeightsError(f"{path}: no model is called {model!r}; the known ones are {', '.join(MODELS)}")
    weights = Weights(path)
    kind = kind_of(weights, model)
    comfyui = kind.key == "latent_tensor"
    others, extras = (_others(weights), extras_of_file(weights)) if comfyui else ((), NONE)
    z = _values(weights, kind)
    if not kind.batched:
        z = _batched(weights, kind, z, model)
    found = _space(weights, kind, z, model)
    scaled = kind.scaled if scaled is None else scaled
    if scaled is None:
        raise WeightsError(f"{path}: this is a {kind.name}, which may be raw or scaled; set scaling to raw or scaled")
    if scaled and fitting_spaces(z.shape):
        space = SPACES[found] if found else _scaling_space(z)
        z, found = space.unscale(z.float()), space.name
    made_by = _made_by(weights) if found else None
    return LatentFile(z, kind.name, found, _frames(weights), others, extras, made_by)


def _values(weights: Weights, kind: Kind) -> Tensor:
    """The tensor, raw or scaled; in float32, except for what ComfyUI saved in another of its dtypes.

    Raises:
        WeightsError: it is empty, not of floats, or not finite.
    """
    comfyui = kind.key == "latent_tensor"
    old = comfyui and "latent_format_version_0" not in weights.shapes
    try:
        z = _floats(weights, kind.key)
        z = z if comfyui and not old and z.dtype in DTYPES else z.float()
        check_finite(z, "latent")
    except ValueError as error:
        raise WeightsError(f"{weights.path}: {kind.key}: {error}") from None
    return z / _OLD_COMFYUI_SCALE if old else z


def _floats(weights: Weights, key: str) -> Tensor:
    """A tensor of floats with values.

    Raises:
        ValueError: says what was found.
    """
    shape = weights.shapes[key]
    if 0 in shape:
        raise ValueError(f"This latent is empty, {list(shape)}.")
    z = weights[key]
    if not z.is_floating_point():
        check_values(z)  # raises; for float tensors it would refuse float8, which files may hold
    return z


def part_keys(parts: int) -> list[str]:
    """The keys of the tensors after the first in a file of a latent of several parts."""
    return [f"latent_part_{n}" for n in range(2, parts + 1)]


def _others(weights: Weights) -> tuple[Tensor, ...]:
    """The parts after the first, bit for bit; none is read before all are there.

    Raises:
        WeightsError: the file does not hold the parts that it counts, or one of them is empty or not of floats.
    """
    text = weights.metadata.get("kvae_parts") or "1"
    if not COUNT.fullmatch(text) or int(text) > MAX_PARTS:
        raise WeightsError(f"{weights.path}: kvae_parts is {text[:60]!r}; expected a number from 1 to {MAX_PARTS}")
    keys, found = part_keys(int(text)), {key for key in weights.shapes if key.startswith("latent_part_")}
    if found != set(keys):
        raise WeightsError(
            f"{weights.path}: kvae_parts is {text}, so after latent_tensor come {_names(keys)}, but the file holds "
            f"{_names(found)}; save the latent again"
        )
    parts = []
    for key in keys:
        try:
            parts.append(_floats(weights, key))
        except ValueError as error:
            raise WeightsError(f"{weights.path}: {key}: {error}") from None
    return tuple(parts)


def _names(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)[:MAX_PARTS])[:300] or "none"


def _batched(weights: Weights, kind: Kind, z: Tensor, model: str | None) -> Tensor:
    """[c, t, h, w] or [t, h, w, c], with or without a batch → [B, c, t, h, w]; an image latent stays as it is.

    Raises:
        WeightsError: two readings fit, and neither the file nor the user decides; or it has other dimensions.
    """
    if z.ndim not in (4, 5):
        raise WeightsError(f"{weights.path}: {kind.key} is {list(z.shape)}; a latent has 4 or 5 dimensions")
    model = kind.model or model
    first = z.shape[-4] in _CHANNELS
    last = z.shape[-1] == SPACES["hunyuan_video"].channels  # only Kandinsky 5 has its channels last
    image = kind.either_layout and z.ndim == 4 and z.shape[1] in _IMAGE_CHANNELS
    if model is not None:
        theirs = model == KANDINSKY and kind.either_layout
        first, last, image = not theirs, theirs and last, False
    elif not kind.either_layout and first:
        last = False  # musubi-tuner saves channels first
    if first + last + image > 1:
        readings = {"[c, t, h, w]": first, "[t, h, w, c]": last, "an image latent": image}
        raise WeightsError(
            f"{weights.path}: {kind.key} is {list(z.shape)}, which can be "
            f"{' or '.join(name for name, fits in readings.items() if fits)}; set model: {KANDINSKY} has its channels "
            "last, all others have them first"
        )
    if last:
        z = z.movedim(-1, -4)
    return z[None] if z.ndim == 4 and (first or last) else z


def _space(weights: Weights, kind: Kind, z: Tensor, model: str | None) -> str | None:
    """The name of the space, if the file or the user names it.

    Raises:
        WeightsError: the two disagree, the space is unknown, or the latent does not have its shape.
    """
    names = {"hunyuan_video" if name == KANDINSKY else name for name in (kind.model, model) if name}
    if len(names) > 1:
        raise WeightsError(
            f"{weights.path}: the file names the space {kind.model}, but model is {model}; set model to auto"
        )
    for name in names:
        if name not in SPACES:
            raise WeightsError(
                f"{weights.path}: names the space {name[:60]!r}; expected one of {', '.join(SPACES)}: update this pack"
            )
        if SPACES[name] not in fitting_spaces(z.shape):
            raise WeightsError(
                f"{weights.path}: {kind.key} is {list(weights.shapes[kind.key])}; a latent of {name} has "
                f"{SPACES[name].channels} channels"
            )
        return name
    return None


def _scaling_space(z: Tensor) -> LatentSpace:
    """The space of this shape whose samplers scale; there is one for each number of channels."""
    return next(space for space in fitting_spaces(z.shape) if space.scaling_factor)


def _made_by(weights: Weights) -> VAEWeights | None:
    """The VAE weights that the metadata name.

    Raises:
        WeightsError: they are not described as in a latent file.
    """
    text = weights.metadata.get("kvae_weights")
    try:
        return build(VAEWeights, parse_object(text)) if text else None
    except ValueError as error:
        raise WeightsError(f"{weights.path}: kvae_weights do not describe the weights of a VAE ({error})") from None


def _frames(weights: Weights) -> int | None:
    text = weights.metadata.get("kvae_frames") or None
    if text and not COUNT.fullmatch(text):
        raise WeightsError(f"{weights.path}: kvae_frames is {text[:60]!r}; expected a number of frames")
    others = (weights.metadata.get(key, "") for key in ("frame_count", "video_length"))  # which may be "None"
    return next((int(each) for each in (text, *others) if each and COUNT.fullmatch(each)), None)
