"""How good adapters are, in latents and in pixels, on the validation pairs of two VAEs.

# B batch, c channels, t latent frames, h/w latent rows and columns; T frames, H/W pixels
# z_Bcthw raw latents, y_3THW decoded pixels in 0..255
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.networks import Network
from kvae_comfyui.serving.metrics import psnr, temporal_error
from kvae_comfyui.training.data.dataset import Pairs, open_pairs, spread
from kvae_comfyui.training.directions import DIRECTIONS
from kvae_comfyui.training.evaluate.originals import original_frames
from kvae_comfyui.training.vaes import VideoVAE, load_hunyuan_vae, load_kvae_for_training

REVERSE = {name: direction.opposite for name, direction in DIRECTIONS.items()}
LATENTS = 5  # latent frames of a clip that are judged
FRAMES = 4 * LATENTS - 3
SIDE = 128  # pixels of a clip, high and wide
ROUNDS = 5  # of every timing


class Judge:
    """Both VAEs, the validation pairs in work/val, and the decodes that every adapter is compared with.

    Args:
        videos_root: folder of the videos that the pairs were extracted from.
        clips: number of pairs to decode, evenly spread over all.
        hunyuan_vae, kvae: the VAEs, as options name them.
    """

    def __init__(self, work: Path, videos_root: str, clips: int, hunyuan_vae: str = "tiny", kvae: str = "tiny"):
        hunyuan, self.kvae = load_hunyuan_vae(hunyuan_vae, "cpu"), load_kvae_for_training(kvae, "cpu")
        self.target: dict[str, VideoVAE] = {"h2k": self.kvae, "k2h": hunyuan}
        self.pairs = open_pairs(work / "val")
        self.clips = spread(len(self.pairs), clips)
        self.originals: dict[int, Tensor] = {}
        self.direct: dict[tuple[str, int], Tensor] = {}  # the target VAE's own decodes of its own latents
        for i in tqdm(self.clips, desc="direct decodes", leave=False, disable=None):
            original = original_frames(self.pairs.name(i), self.pairs[i], videos_root)
            self.originals[i] = original[:, :FRAMES].float()
            for direction in DIRECTIONS:
                self.direct[direction, i] = self.decode(direction, self.latents(direction, i)[1])

    def latents(self, direction: str, i: int) -> tuple[Tensor, Tensor]:
        """Source and target latents of pair i, [1, c, t, h, w]."""
        z_h, z_k = self.pairs.batch([i], torch.device("cpu"))
        z_h, z_k = z_h[:, :, :LATENTS], z_k[:, :, :LATENTS]
        return DIRECTIONS[direction].ordered(z_h, z_k)

    def decode(self, direction: str, z_Bcthw: Tensor) -> Tensor:
        """Decode with the target VAE: [3, T, H, W] in 0..255."""
        return self.target[direction].decode(z_Bcthw)[0]

    def pixel_path(self, direction: str, i: int) -> Tensor:
        """Pair i decoded with the source VAE, then encoded and decoded with the target VAE."""
        source = self.direct[REVERSE[direction], i]
        return self.decode(direction, self.target[direction].encode(source[None].round().byte()))

    def metrics(self, direction: str, i: int, y_3THW: Tensor) -> tuple[float, float, float]:
        """PSNR against the original, PSNR against the source VAE's own decode, flicker."""
        x, source = self.originals[i], self.direct[REVERSE[direction], i]
        return psnr(y_3THW, x), psnr(y_3THW, source), temporal_error(y_3THW, x)

    def noisy(self, direction: str, i: int, noise: float) -> Tensor:
        """Source latents of pair i with white noise, the same noise for every adapter.

        Args:
            noise: its deviation divided by that of each channel.
        """
        z, _ = self.latents(direction, i)
        draw = torch.randn(z.shape, generator=torch.Generator().manual_seed(i))
        return z + noise * z.std((0, 2, 3, 4), keepdim=True) * draw

    def noise_in_source(self, direction: str, noise: float) -> Tensor:
        """[clips] PSNR of the source VAE's decodes of noisy latents against its decodes of the clean ones."""
        reverse = REVERSE[direction]
        decodes = {i: self.decode(reverse, self.noisy(direction, i, noise)) for i in self.clips}
        return torch.tensor([psnr(y, self.direct[reverse, i]) for i, y in decodes.items()])

    def pixels(self, direction: str, networks: Sequence[Network | LatentAdapter], noise: float = 0.0) -> Tensor:
        """[clips, 3] metrics of the adapters' decodes, means over the networks."""
        found = []
        for i in self.clips:
            z = self.noisy(direction, i, noise)
            metrics = [self.metrics(direction, i, self.decode(direction, network(z))) for network in networks]
            found.append(torch.tensor(metrics).mean(0))
        return torch.stack(found)


def nmse(direction: str, networks: Sequence[Network | LatentAdapter], pairs: Pairs, latents: int = LATENTS) -> float:
    """Squared error over the first latent frames of each pair divided by the targets' variance; mean over networks."""
    errors, targets = [], []
    for i in range(len(pairs)):
        z_h, z_k = (z[:, :, :latents] for z in pairs.batch([i], torch.device("cpu")))
        z, target = DIRECTIONS[direction].ordered(z_h, z_k)
        errors += [(network(z) - target).square().mean().item() for network in networks]
        targets.append(target)
    return statistics.mean(errors) / torch.cat(targets).var((0, 2, 3, 4)).mean().item()


def mean_and_difference(metric: Tensor, base: Tensor) -> str:
    """Two cells: the mean, and the mean difference to `base` clip by clip ± its standard error."""
    difference = metric - base
    error = difference.std() / math.sqrt(len(difference))
    signed = f"{difference.mean():+.3f}".replace("-", "−")
    return f"{metric.mean():.2f} | {signed} ± {error:.3f}"


def frame_deviation(network: nn.Module, z_Bcthw: Tensor) -> float:
    """Relative difference between frame 0 mapped alone and frame 0 of the mapped clip."""
    of_clip = network(z_Bcthw)[:, :, :1]
    return ((network(z_Bcthw[:, :, :1]) - of_clip).norm() / of_clip.norm()).item()


def tile_deviation(network: Network, z_Bcthw: Tensor) -> float:
    """Relative difference between a mapped tile of half the width and the mapped clip, receptive field excluded."""
    half = z_Bcthw.shape[4] // 2
    of_clip = network(z_Bcthw)[..., : half - network.radius]
    return ((network(z_Bcthw[..., :half])[..., : half - network.radius] - of_clip).norm() / of_clip.norm()).item()


def median_seconds(*runs: Callable[[], object]) -> list[float]:
    """Median time of each call, made in turns, after one round that does not count."""
    times: list[list[float]] = []
    for _ in range(1 + ROUNDS):
        times.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(each) for each in zip(*times[1:], strict=True)]
