"""What the default recipe of the adapters was taken apart into, and what was tried beside it: recipes for the bench.

# B batch, c channels, t latent frames, h/w latent rows and columns; z_h HunyuanVideo's latents, z_k KVAE's
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvae_comfyui.adapters.networks import Network
from kvae_comfyui.training.recipe import Errors, Networks, Recipe, latent_error, latent_errors, with_change
from kvae_comfyui.training.vaes import load_hunyuan_vae, load_kandinsky_vae

DECODED = (2, 3, 6, 6)  # clips, latent frames, rows and columns that a step decodes
JACOBIANS = 16  # times as many crops
FLOOR = 1e-4  # added to squared errors of decodes: pixels 46 dB alike need not come nearer


PLAIN = Recipe(loss=latent_errors)


def ingredients() -> dict[str, tuple[dict[str, Any], Recipe]]:
    """Names → options that are not the command's defaults, and the recipe: PLAIN first, then one change of it each."""
    return {
        "squared errors alone": ({}, PLAIN),
        "not from the closed form": ({}, replace(PLAIN, closed_form=False)),
        "AdamW, 2e-3": ({"lr": 2e-3}, replace(PLAIN, muon=False)),
        "width 32": ({}, replace(PLAIN, network={"width": 32})),
        "one block": ({}, replace(PLAIN, network={"blocks": 1})),
        "three blocks": ({}, replace(PLAIN, network={"blocks": 3})),
        "+ noise of up to 10 %": ({}, replace(PLAIN, loss=partial(with_noise, share=0.1))),
        "+ cycle, weight 0.1": ({}, replace(PLAIN, loss=partial(with_cycle, factor=0.1))),
        "+ change in time": ({}, replace(PLAIN, loss=partial(with_change, axes={2: 1.0}))),
        "+ change in space": ({}, replace(PLAIN, loss=partial(with_change, axes={3: 0.5, 4: 0.5}))),
        "+ decodes, K→H": ({}, replace(PLAIN, loss=WithDecodes(0.1))),
        "by the decoders' Jacobians": ({}, replace(PLAIN, loss=ByJacobians())),
    }


def with_noise(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, share: float) -> Errors:
    """White noise in the sources, of up to this share of their deviation, one strength for each clip."""

    def noisy(z: Tensor, network: Network) -> Tensor:
        strength = share * torch.rand(len(z), 1, 1, 1, 1, device=z.device)
        return z + strength * network.get_buffer("source_std") * torch.randn_like(z)

    return {
        "h2k": latent_error(networks["h2k"](noisy(z_h, networks["h2k"])), z_k, weight),
        "k2h": latent_error(networks["k2h"](noisy(z_k, networks["k2h"])), z_h, weight),
    }


def with_cycle(networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor, factor: float) -> Errors:
    """And there and back again must be where it was."""
    k_hat, h_hat = networks["h2k"](z_h), networks["k2h"](z_k)
    return {
        "h2k": latent_error(k_hat, z_k, weight),
        "k2h": latent_error(h_hat, z_h, weight),
        "h2k2h": factor * latent_error(networks["k2h"](k_hat), z_h, weight),
        "k2h2k": factor * latent_error(networks["h2k"](h_hat), z_k, weight),
    }


class WithDecodes:
    """And HunyuanVideo's frozen decoder must make the same of K→H's crops as of the right ones.

    The term is the mean logarithm of squared errors, one for each crop, which is PSNR.

    Args:
        factor: of that term.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.vae = load_hunyuan_vae("tiny", "cpu").vae

    def __call__(self, networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor) -> Errors:
        h_hat = networks["k2h"](z_k)
        found, target = random_crops(h_hat, z_h)
        with torch.no_grad():
            x = self.vae.decode(target).sample
        square = (self.vae.decode(found).sample - x).square().flatten(1).mean(1)
        return {
            "h2k": latent_error(networks["h2k"](z_h), z_k, weight),
            "k2h": latent_error(h_hat, z_h, weight),
            "decodes": self.factor * (square + FLOOR).log().mean(),
        }


class ByJacobians:
    """Errors of latents weigh as much as they show: e'Me, where M is a frozen decoder's mean J'J, of mean eigenvalue 1.

    Taken from the first batch, with random signs v of the pixels: J'J is the mean of J'v (J'v)'.
    """

    def __init__(self) -> None:
        kvae, hunyuan = load_kandinsky_vae("tiny", "cpu").kvae, load_hunyuan_vae("tiny", "cpu").vae
        self.decoders = {"h2k": kvae.decode, "k2h": lambda z: hunyuan.decode(z).sample}
        self.roots: dict[str, Tensor] = {}

    def __call__(self, networks: Networks, z_h: Tensor, z_k: Tensor, weight: Tensor) -> Errors:
        targets = {"h2k": z_k, "k2h": z_h}
        self.roots = self.roots or {name: self.root(name, z) for name, z in targets.items()}
        found = {"h2k": networks["h2k"](z_h), "k2h": networks["k2h"](z_k)}

        def weighed(name: str, z_Bcthw: Tensor) -> Tensor:
            return torch.einsum("dc,bcthw->bdthw", self.roots[name], z_Bcthw)

        return {name: latent_error(weighed(name, y), weighed(name, targets[name]), weight) for name, y in found.items()}

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
    """The same `DECODED` at random places of random clips of each."""
    crops = []
    for b in torch.randperm(len(z_Bcthw[0]))[: DECODED[0]].tolist():
        where = [slice(None)]
        for n, size in zip(z_Bcthw[0].shape[2:], DECODED[1:], strict=True):
            start = int(torch.randint(n - size + 1, ()))
            where.append(slice(start, start + size))
        crops.append([z[b][tuple(where)] for z in z_Bcthw])
    return [torch.stack(each) for each in zip(*crops, strict=True)]
