"""Which weights of a VAE an adapter or a latent is for: their identity, and the words for it.

Two VAEs of one space, such as two trainings of one architecture, make latents of one shape and of different meaning.
Adapter files and the latents of this project therefore name the weights, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..kvae.signature import same_weights, unrelated_weights


@dataclass(frozen=True)
class VAEWeights:
    """The identity of a VAE's weights: the hash of their file, and a signature that conversions do not change."""

    sha256: str = ""
    signature: tuple[float, ...] = ()  # see kvae.signature


@dataclass(frozen=True)
class Known:
    """Weights with a name: the hash of their file, and how their signature begins."""

    name: str
    sha256: str
    begins: tuple[float, ...]


# the VAEs in training/tiny/assets
KNOWN = (
    Known(
        "this project's tiny HunyuanVideo VAE",
        "34f4b0d2fdeeef12bb4a0088e7ae89e0172b2fce158ced319b7c97fe272f81e1",
        (0.01017, -0.0145264, -0.0506287, 0.0315857),
    ),
    Known(
        "this project's tiny KVAE",
        "ac36752f4631b4274b6c480c8587388844ff54b4b9f1e3d64e61cb8a674c9343",
        (-0.0259094, 0.0603638, -0.000860691, 0.0108871),
    ),
    Known(
        "this project's tiny HunyuanVideo 1.5 VAE",
        "ad939806ff375e05f2cea974fcd9450db8d3630f678fcd756fa853a2f209d7ea",
        (-0.0064888, -0.0673218, 0.0185852, -0.319824),
    ),
    Known(
        "this project's tiny KVAE 2.0-t4s16",
        "ee45424e138afdf64572de2b7df10b22108cb326cce23e06e6467716ab27a281",
        (0.0251617, 0.0609741, 0.00906372, -0.00752258),
    ),
)
_SHOWN = 12  # digits of a hash, as the hub shows them


def known_name(weights: VAEWeights) -> str:
    """The name of these weights; empty if they have none."""
    for known in KNOWN:
        begins = weights.signature[: len(known.begins)]
        if weights.sha256 == known.sha256 or (begins and same_weights(begins, known.begins)):
            return known.name
    return ""


def in_words(space: str, weights: VAEWeights) -> str:
    """The VAE of a space with these weights, as words that complete "made for …"."""
    if name := known_name(weights):
        return f"{name} ({space})"
    if weights.sha256:
        return f"the {space} VAE with sha256 {weights.sha256[:_SHOWN]}…"
    begins = ", ".join(f"{value:g}" for value in weights.signature[:3])
    return f"the {space} VAE whose signature begins {begins}" if begins else f"a {space} VAE of unknown weights"


def check_latent_weights(space: str, made: VAEWeights | None, read: VAEWeights | None) -> None:
    """Raise if a latent is of a VAE whose latents mean something else here. Unknown weights pass.

    Args:
        made: the weights of the VAE of `space` that the latent is of.
        read: the weights of the VAE of `space` whose latents are read here.

    Raises:
        ValueError: neither encoder nor decoder of the two are the same.
    """
    if made is None or read is None or (made.sha256 and made.sha256 == read.sha256):
        return
    if unrelated_weights(made.signature, read.signature):
        raise ValueError(
            f"This is a latent of {in_words(space, made)}; expected one of {in_words(space, read)}. Both have the same "
            "shape, but not the same meaning: use the VAE or the adapters that the latent was made with."
        )
