"""The ingredients of the default recipe, and others that were tried: recipes for `benchmarks.adapters`.

# B batch, c channels, t latent frames, h/w latent rows and columns; z_h HunyuanVideo's latents, z_k KVAE's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvae_comfyui.adapters.networks import Network
from kvae_comfyui.training.adapters.recipe import Errors, Networks, Recipe, latent_error, latent_errors, with_change
from kvae_comfyui.training.directions import DIRECTIONS
from kvae_comfyui.training.vaes import load_hunyuan_vae, load_kvae_for_training

DECODED = (2, 3, 6, 6)  # clips, latent frames, rows and columns that a step decodes
JACOBIANS = 16  # draws of DECODED crops that M is averaged over
FLOOR = 1e-4  # added to squared errors of decodes: pixels that agree to 46 dB need not come closer

PLAIN = Recipe(loss=latent_errors)


def ingredients() -> dict[str, tuple[dict[str, Any], Recipe]]:
    """Names → changed options of `train`, and the recipe: PLAIN first, then recipes that change one thing in it."""
    return {
        "squared errors alone": ({}, PLAIN),
        "not from the closed form": ({}, replace(PLAIN, closed_form=False)),
        "AdamW, 2e-3": ({"lr": 2e-3}, replace(PLAIN, muon=False)),
        "width 32": ({}, replace(PLAIN, network={"width": 32})),
        "one block": ({}, replace(PLAIN, network={"blocks": 1})),
        "three blocks": ({}, replace(PLAIN, network={"blocks": 3})),
        "+ noise of up to 10 %": ({}, replace(PLAIN, loss=partial(with_noise, share=0.1))),
        "+ statistics off by up to 10 %": ({}, replace(PLAIN, loss=partial(with_statistics, share=0.1))),
        "+ cycle, weight 0.1": ({}, replace(PLAIN, loss=partial(with_cycle, factor=0.1))),
        "+ change in time": ({}, replace(PLAIN, loss=partial(with_change, axes={2: 1.0}))),
        "+ change in space": ({}, replace(PLAIN, loss=partial(with_change, axes={3: 0.5, 4: 0.5}))),
        "+ decodes, K→H": ({}, replace(PLAIN, loss=WithDecodes(0.1, ("k2h",)))),
        "+ decodes, from step 260 on": ({}, replace(PLAIN, loss=WithDecodes(0.05, tuple(DIRECTIONS), after=260))),
        "by the decoders' Jacobians": ({}, replace(PLAIN, loss=ByJacobians())),
    }


def with_noise(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, share: float) -> Errors:
    """Add white noise to the sources, one strength for each clip: up to `share` of their deviation."""

    def noisy(z: Tensor, network: Network) -> Tensor:
        strength = share * torch.rand(len(z), 1, 1, 1, 1, device=z.device)
        return z + strength * network.get_buffer("source_std") * torch.randn_like(z)

    return _from_disturbed(networks, z_h, z_k, weight, noisy)


def with_statistics(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, share: float) -> Errors:
    """Scale and shift every source channel, one draw for each clip: by up to `share` of its deviation."""

    def shifted(z: Tensor, network: Network) -> Tensor:
        scale, shift = share * (2 * torch.rand(2, *z.shape[:2], 1, 1, 1, device=z.device) - 1)
        mean, std = (network.get_buffer(f"source_{name}") for name in ("mean", "std"))
        return z + scale * (z - mean) + shift * std

    return _from_disturbed(networks, z_h, z_k, weight, shifted)


def _from_disturbed(
    networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, disturb: Callable[[Tensor, Network], Tensor]
) -> Errors:
    """Squared errors of both adapters on disturbed sources."""
    return {
        "h2k": latent_error(networks["h2k"](disturb(z_h, networks["h2k"])), z_k, weight),
        "k2h": latent_error(networks["k2h"](disturb(z_k, networks["k2h"])), z_h, weight),
    }


def with_cycle(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, factor: float) -> Errors:
    """Squared errors of both adapters, and `factor` times those of both round trips."""
    k_hat, h_hat = networks["h2k"](z_h), networks["k2h"](z_k)
    return {
        "h2k": latent_error(k_hat, z_k, weight),
        "k2h": latent_error(h_hat, z_h, weight),
        "h2k2h": factor * latent_error(networks["k2h"](k_hat), z_h, weight),
        "k2h2k": factor * latent_error(networks["h2k"](h_hat), z_k, weight),
    }


class WithDecodes:
    """Squared errors of both adapters, and errors of the decodes of random crops by the targets' frozen decoders.

    The second term is the mean logarithm of the squared error of each crop, which is its PSNR.

    Args:
        factor: weight of the second term.
        directions: the directions that have the second term.
        after: number of steps without the second term.
    """

    def __init__(self, factor: float, directions: Sequence[str], after: int = 0):
        self.factor, self.directions, self.after = factor, directions, after
        self.decoders = load_decoders()
        self.steps = 0

    def __call__(self, networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor) -> Errors:
        found = {"h2k": (networks["h2k"](z_h), z_k), "k2h": (networks["k2h"](z_k), z_h)}
        errors = {name: latent_error(y, target, weight) for name, (y, target) in found.items()}
        self.steps += 1
        for name in self.directions if self.steps > self.after else ():
            crop, target = random_crops(*found[name])
            with torch.no_grad():
                x = self.decoders[name](target)
            square = (self.decoders[name](crop) - x).square().flatten(1).mean(1)
            errors[f"{name} decodes"] = self.factor * (square + FLOOR).log().mean()
        return errors


def load_decoders() -> dict[str, Callable[[Tensor], Tensor]]:
    """The frozen decoder of each direction's targets, from the tiny VAEs: raw latents → pixels in −1..1."""
    kvae, hunyuan = load_kvae_for_training("tiny", "cpu").kvae, load_hunyuan_vae("tiny", "cpu").vae
    return {"h2k": kvae.decode, "k2h": lambda z: hunyuan.decode(z).sample}


class ByJacobians:
    """Errors e of latents, weighted by how much they change the decode: e'Me with M, a frozen decoder's mean J'J.

    M is scaled to a mean eigenvalue of 1. It is estimated from the first batch: with random signs v of the pixels,
    J'J is the mean of J'v (J'v)'.
    """

    def __init__(self) -> None:
        self.decoders = load_decoders()
        self.roots: dict[str, Tensor] = {}

    def __call__(self, networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor) -> Errors:
        targets = {"h2k": z_k, "k2h": z_h}
        self.roots = self.roots or {name: self.root(name, z) for name, z in targets.items()}
        found = {"h2k": networks["h2k"](z_h), "k2h": networks["k2h"](z_k)}

        def weighted(name: str, z_Bcthw: Tensor) -> Tensor:
            return torch.einsum("dc,bcthw->bdthw", self.roots[name], z_Bcthw)

        return {
            name: latent_error(weighted(name, y), weighted(name, targets[name]), weight) for name, y in found.items()
        }

    def root(self, name: str, z_Bcthw: Tensor) -> Tensor:
        """[c, c]: the square root of M."""
        squares = []
        for _ in range(JACOBIANS):
            (z,) = random_crops(z_Bcthw)
            y = self.decoders[name](z.requires_grad_())
            (g,) = torch.autograd.grad((y * torch.randn_like(y).sign()).sum(), z)
            squares.append(torch.einsum("bcthw,bdthw->cd", g, g))
        M = torch.stack(squares).mean(0)
        values, vectors = torch.linalg.eigh(M * len(M) / M.trace())
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def random_crops(*z_Bcthw: Tensor) -> list[Tensor]:
    """Crop `DECODED` at random places of random clips; the same places in each tensor."""
    crops = []
    for b in torch.randperm(len(z_Bcthw[0]))[: DECODED[0]].tolist():
        region = [slice(None)]
        for n, size in zip(z_Bcthw[0].shape[2:], DECODED[1:], strict=True):
            start = int(torch.randint(n - size + 1, ()))
            region.append(slice(start, start + size))
        crops.append([z[b][tuple(region)] for z in z_Bcthw])
    return [torch.stack(each) for each in zip(*crops, strict=True)]
