"""How often Inspect Latent's guess is wrong, and a decode's warnings: latents of every VAE at hand, raw and scaled.

    python -m benchmarks.which --videos UCF101 real --work bench-which --write docs/results/which.md

Of UCF101 only the groups g01 to g07 count, which no VAE here was trained on. Real weights of the large VAEs are not at
hand: their published levels, means and deviations are given to the latents of the tiny VAEs and of VAEs with random
weights, so that clips differ as real clips do. `--hunyuan-vae` and `--kvae` add weights of your own, as they are.
Latents stay under --work: the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.benchmarks.random_vaes import Encode, random_vaes
from kvae_comfyui.benchmarks.tables import head, publish
from kvae_comfyui.kvae.files import save_weights
from kvae_comfyui.serving.inspect import LIKELY
from kvae_comfyui.serving.latent_statistics import SCALED as SCALED_KIND
from kvae_comfyui.serving.latent_statistics import UNSCALED_TWICE, WAN, wrong_kind
from kvae_comfyui.serving.likely_space import OTHER, SCALED, candidates, likely, state_within
from kvae_comfyui.serving.noise import BLUNT, neighbour_correlation, noise_in
from kvae_comfyui.training.data.videos import Clip, find_videos, read_clip
from kvae_comfyui.training.vaes import VideoVAE, load_hunyuan_vae, load_kvae_for_training

# z_BCthw the latents of all clips by one VAE

FRAMES, HEIGHT, WIDTH = 9, 64, 96
EVERY = 4  # every so many clips are also encoded at twice the height and width
SMALL = 4  # rows and columns of a crop
BINS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of odds
SHARES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of noise in a sampler's latents
HUNYUAN = SPACES["hunyuan_video"]

Latents = dict[str, Tensor]  # by kind: clips, frames, crops, large


@dataclass(frozen=True)
class Case:
    """Latents of one VAE, what they truly are, and of which kind."""

    truth: str
    kind: str
    vae: str
    z_BCthw: Tensor


def main() -> None:
    """Encode, guess, and print the tables; write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", required=True, nargs="+", type=Path, help="UCF101, and folders of other videos")
    parser.add_argument("--work", required=True, type=Path, help="folder for the latents")
    parser.add_argument("--clips", type=int, default=0, help="clips of each folder (default: all)")
    parser.add_argument("--hunyuan-vae", help="a VAE of HunyuanVideo or HunyuanVideo 1.5, to be guessed as it is")
    parser.add_argument("--kvae", help="a KVAE-3D, to be guessed as it is")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    videos = [video for folder in options.videos for video in _validation(folder, options.clips)]
    cases = []
    for name, latents in latents_of_vaes(videos, options.work):
        cases += stand_ins(name, latents)
    for name, vae in _given(options):
        cases += as_they_are(name, vae, encode_all(f"{name}-{vae.digest[:12]}", vae.encode, videos, options.work))
    publish(report(cases, len(videos)), options.write)


def _validation(folder: Path, clips: int) -> list[Path]:
    """The videos to take of a folder, evenly spread."""
    ucf = any(path.name.startswith("v_") and "_g0" in path.name for path in find_videos(folder))
    videos = find_videos(folder, "test" if ucf else "all")
    return [videos[i * len(videos) // clips] for i in range(min(clips, len(videos)))] if clips else videos


def _given(options: argparse.Namespace) -> list[tuple[str, VideoVAE]]:
    given: list[tuple[str, VideoVAE]] = []
    if options.hunyuan_vae:
        given.append(("given-hunyuan", load_hunyuan_vae(options.hunyuan_vae, "cpu")))
    if options.kvae:
        given.append(("given-kvae", load_kvae_for_training(options.kvae, "cpu")))
    return given


def latents_of_vaes(videos: list[Path], work: Path) -> Iterator[tuple[str, Latents]]:
    """The latents of the tiny VAEs, and of VAEs with random weights."""
    tiny = (
        ("tiny-hunyuan", lambda: load_hunyuan_vae("tiny", "cpu")),
        ("tiny-kvae", lambda: load_kvae_for_training("tiny", "cpu")),
        ("tiny-hunyuan-1.5", lambda: load_hunyuan_vae("tiny-1.5", "cpu")),
        ("tiny-kvae-t4s16", lambda: load_kvae_for_training("tiny-t4s16", "cpu")),
    )
    for name, load in tiny:
        yield name, encode_all(name, load().encode, videos, work)
    for name, encode in random_vaes():
        yield name, encode_all(f"random-{name}", encode, videos, work)


def encode_all(name: str, encode: Encode, videos: list[Path], work: Path) -> Latents:
    """The latents of all clips, and of their first frames alone; crops of them; some clips at twice the size."""
    path = work / f"{name}.safetensors"
    if not path.exists():
        found: dict[str, list[Tensor]] = {"clips": [], "frames": [], "large": []}
        for i, video in enumerate(tqdm(videos, desc=name, disable=None)):
            x_3THW = read_clip(Clip(video, FRAMES, 0), HEIGHT, WIDTH)
            found["clips"].append(encode(x_3THW[None]))
            found["frames"].append(encode(x_3THW[None, :, :1]))
            if i % EVERY == 0:
                found["large"].append(encode(read_clip(Clip(video, FRAMES, 0), 2 * HEIGHT, 2 * WIDTH)[None]))
        save_weights(path, {kind: torch.cat(each).half() for kind, each in found.items()}, {})
    latents = {kind: z.float() for kind, z in load_file(path).items()}
    top, left = ((side - SMALL) // 2 for side in latents["clips"].shape[3:])
    latents["crops"] = latents["clips"][..., top : top + SMALL, left : left + SMALL]
    return latents


def stand_ins(name: str, latents: Latents) -> list[Case]:
    """These latents as those of every candidate, by its level, or by the means and deviations of its channels; and as
    they are, as those of a VAE of which nothing is known.
    """
    clips = latents["clips"]
    mean_C, std_C = clips.mean((0, 2, 3, 4), keepdim=True), clips.std((0, 2, 3, 4), keepdim=True)
    level, found = clips.square().mean().sqrt(), []
    for each in candidates(clips.shape[1]):
        for kind, z_BCthw in latents.items():
            if each.mean:
                z = (z_BCthw - mean_C) / std_C * _channels(each.std) + _channels(each.mean)
            else:
                z = z_BCthw / level * each.level if each.level else z_BCthw
            found.append(Case(str(each), kind, name, z))
    return found


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


def as_they_are(name: str, vae: VideoVAE, latents: Latents) -> list[Case]:
    """Latents of given weights, raw and scaled."""
    cases = []
    for each in candidates(vae.space.channels):
        if vae.space.name in each.spaces.split(" or "):
            for kind, z in latents.items():
                cases.append(Case(str(each), kind, name, vae.space.scale(z) if each.state == SCALED else z))
    return cases


def report(cases: list[Case], clips: int) -> Iterator[str]:
    """The lines of the results file."""
    vaes = ", ".join(dict.fromkeys(case.vae for case in cases))
    settings = (
        f"{clips} clips of {FRAMES}x{HEIGHT}x{WIDTH}; their first frames alone; crops of {SMALL}x{SMALL} latents; "
        f"every {EVERY}th clip at twice the height and width. VAEs: {vaes}."
    )
    yield from head("Which VAE made this latent? How often the guess is wrong", settings)
    guesses = [(case, *_best(case.z_BCthw)) for case in tqdm(cases, desc="guess", disable=None, leave=False)]
    for channels in sorted({case.z_BCthw.shape[1] for case in cases}):
        yield from _confusion([each for each in guesses if each[0].z_BCthw.shape[1] == channels], channels)
    yield from _by_odds(guesses)
    yield from _by_kind(guesses)
    yield from _raw_or_scaled(cases)
    yield from _warnings(cases)
    yield from _noise(cases)


def _best(z_BCthw: Tensor) -> tuple[list[str], Tensor]:
    """The best candidate for each latent, and its odds."""
    best = [likely(z[None])[0] for z in z_BCthw]
    return [str(each) for each, _ in best], torch.tensor([odds for _, odds in best])


Guesses = list[tuple[Case, list[str], Tensor]]


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _share(part: float, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def _confusion(guesses: Guesses, channels: int) -> Iterator[str]:
    names = [str(each) for each in candidates(channels)]
    rows = []
    for truth in names:
        best = Counter(name for case, each, _ in guesses if case.truth == truth for name in each)
        rows.append([truth, str(best.total()), *(_share(best[name], best.total()) for name in names)])
    yield from _table(f"{channels} channels: what was guessed", ["truth", "latents", *names], rows)


def _by_odds(guesses: Guesses) -> Iterator[str]:
    """Errors by what the report claims; of VAEs about which nothing is known separately."""
    rows = []
    for low, high in zip(BINS, (*BINS[1:], 1.01), strict=True):
        row = [f"{100 * low:.0f} to {100 * min(high, 1):.0f} %"]
        for unknown in (False, True):
            right = [
                name == case.truth
                for case, best, odds in guesses
                if (OTHER in case.truth) == unknown
                for name, p in zip(best, odds.tolist(), strict=True)
                if low <= p < high
            ]
            row += [str(len(right)), _share(len(right) - sum(right), len(right))]
        rows.append(row)
    columns = ["odds of the guess", "latents of known VAEs", "wrong", "latents of other VAEs", "wrong"]
    yield from _table("Errors, by the odds that the report states", columns, rows)


def _by_kind(guesses: Guesses) -> Iterator[str]:
    rows = []
    for kind in dict.fromkeys(case.kind for case, *_ in guesses):
        said = [
            (name == case.truth, p >= LIKELY)
            for case, best, odds in guesses
            if case.kind == kind and OTHER not in case.truth
            for name, p in zip(best, odds.tolist(), strict=True)
        ]
        sure = [right for right, likely in said if likely]
        right = sum(right for right, _ in said)
        rows.append([
            kind, str(len(said)), _share(len(said) - right, len(said)), _share(len(sure), len(said)),
            _share(len(sure) - sum(sure), len(sure)),
        ])  # fmt: skip
    columns = ["latents", "count", "best guess is wrong", f"called likely (≥ {100 * LIKELY:.0f} %)", "of those wrong"]
    yield from _table("Known VAEs, by the size of the latent", columns, rows)


def _raw_or_scaled(cases: list[Case]) -> Iterator[str]:
    rows = []
    for case_state in ("raw", "scaled"):
        states = [
            state_within(likely(z[None]), HUNYUAN)
            for case in cases
            if case.truth == f"{case_state} {HUNYUAN.name}"
            for z in case.z_BCthw
        ]
        sure = [state for state, odds in states if odds >= LIKELY]
        rows.append([
            case_state, str(len(states)), _share(sum(state != case_state for state, _ in states), len(states)),
            _share(len(sure), len(states)), _share(sum(state != case_state for state in sure), len(sure)),
        ])  # fmt: skip
    columns = ["truth", "latents", "wrong", f"stated with ≥ {100 * LIKELY:.0f} %", "of those wrong"]
    yield from _table("hunyuan_video: raw or scaled?", columns, rows)


def _warnings(cases: list[Case]) -> Iterator[str]:
    """What a decode of 16-channel latents as raw ones of HunyuanVideo warns of."""
    truths = [str(each) for each in candidates(16)]
    rows = []
    for truth in truths:
        zs = [z for case in cases if case.truth == truth for z in case.z_BCthw]
        kinds = Counter(wrong_kind(z[None], HUNYUAN)[0] for z in zs)
        rows.append(
            [truth, str(len(zs)), *(_share(kinds[kind], len(zs)) for kind in (WAN, SCALED_KIND, UNSCALED_TWICE))]
        )
    columns = ["truth", "latents", "warns of Wan 2.1", "of scaled", "of unscaled twice"]
    yield from _table("Warnings when they are decoded as raw latents of hunyuan_video", columns, rows)


def _noise(cases: list[Case]) -> Iterator[str]:
    """What is called noise: finished latents, and those of whole clips as a sampler sees them."""
    finished: dict[str, dict[str, Tensor]] = {}
    for case in cases:  # once for each VAE: what they stand for does not count
        finished.setdefault(case.kind, {})[case.vae] = case.z_BCthw
    rows = [_called_noise(kind, [*found.values()]) for kind, found in finished.items()]
    clips = [*finished["clips"].values(), *finished["large"].values()]
    torch.manual_seed(0)
    for share in SHARES:
        noisy = [_noisy(z_BCthw, share) for z_BCthw in clips]
        rows.append(_called_noise(f"clips and large with {100 * share:.0f} % noise", noisy))
    columns = ["latents", "count", "too small to judge", "called noise", "called mostly noise"]
    yield from _table("Noise", columns, rows)


def _called_noise(name: str, found: list[Tensor]) -> list[str]:
    """A row: latents [B, C, t, h, w] of several VAEs."""
    zs = [z[None] for z_BCthw in found for z in z_BCthw]
    judged = [(neighbour_correlation(z) or (0.0, 1.0))[1] <= BLUNT for z in zs]
    said = [noise_in(z) or "" for z in zs]
    mostly = sum("mostly" in each for each in said)
    noise = sum(bool(each) for each in said) - mostly
    return [name, str(len(zs)), *(_share(part, len(zs)) for part in (len(zs) - sum(judged), noise, mostly))]


def _noisy(z_BCthw: Tensor, share: float) -> Tensor:
    """Latents as a flow's sampler has them: the rest of 1 is the picture, scaled channel by channel."""
    var, mean = torch.var_mean(z_BCthw, (0, 2, 3, 4), keepdim=True)
    return (1 - share) * (z_BCthw - mean) / var.sqrt() + share * torch.randn_like(z_BCthw)


if __name__ == "__main__":
    main()
