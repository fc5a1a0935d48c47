"""Does a Video-Free LoRA learn what it should? A toy in which that is known, on the product's own step and losses.

    python -m benchmarks.video_free_lora --work bench-vfl
    python -m benchmarks.video_free_lora --work bench-vfl --rows main appearance "6 stills"

Sprites of two colours cross a picture (`benchmarks.toy.world`). The base, a small network of HunyuanVideo 1.5's
architecture, has learned to move sprites of one colour, or of two that are near. The LoRA is to keep any two colours,
and sees first frames alone. It is judged by what no loss sees: the true clips of 96 sprites that were never shown.
Base, head and every row's results stay under --work: the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from kvae_comfyui.benchmarks.tables import head, publish
from kvae_comfyui.benchmarks.toy.judge import HELD_OUT, METRICS
from kvae_comfyui.benchmarks.toy.measure import Found, measure, prepare
from kvae_comfyui.benchmarks.toy.rows import FAULTS, GROUPS, Row

Chosen = dict[str, dict[str, Row]]  # group → name → row
RELATIVE = ("place", "tones", "change", "pixels", "head")  # columns in per cent of the base's mean
COLUMNS = """\
All columns but the last two are differences to the base, on the same sprites and the same noise.

- *true place*: squared error of the pixels where the sprite truly is. *tones*: of the mean of each of its two colours
  there. *pixels*: of all pixels. *head*: the identity loss, which the training saw, so it is no judge. In per cent of
  the base's mean; the mean over sprites and seeds ± its standard error over the sprites, then each seed's in brackets.
- *frame change*: mean |change| from frame to frame, in the same per cent. *path*: length of the way of what is not
  background, divided by the true one, in per cent. *off*: squared error where the sprite truly is not, ·10⁵.
- *share*: L_distill / mean v_T² at the end of the training. *s*: seconds of one training on a core."""


def main() -> None:
    """Train what is not there yet; print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="folder for the base, the heads and the results")
    parser.add_argument("--rows", nargs="+", default=["main"], help=f"rows, or groups: {', '.join(GROUPS)} (main)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each of the main rows (default 3)")
    parser.add_argument("--part-seeds", type=int, default=1, help="trainings of each other row (default 1)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, each on one core (default 2)")
    parser.add_argument("--write", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = select(options.rows, parser)
    options.work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        prepare(options.work, [row for rows in chosen.values() for row in rows.values()], pool)
        base = measure(options.work, "base", None, 0)
        found = measure_all(options.work, chosen, options.seeds, options.part_seeds, pool)
    publish(report(base, found, chosen), options.write)


def select(names: list[str], parser: argparse.ArgumentParser) -> Chosen:
    """The rows of each group that was asked for, by the group's name or by their own."""
    known = {name for rows in GROUPS.values() for name in rows} | set(GROUPS)
    for name in names:
        if name not in known:
            parser.error(f"--rows {name}: no such row; expected {', '.join(sorted(known))}")
    chosen = {
        group: {name: row for name, row in rows.items() if group in names or name in names}
        for group, rows in GROUPS.items()
    }
    return {group: rows for group, rows in chosen.items() if rows}


def measure_all(work: Path, chosen: Chosen, seeds: int, part_seeds: int, pool: Executor) -> dict[str, list[Found]]:
    """Every row with each of its seeds: all with the first, then all with the next."""
    counts = {name: seeds if group == "main" else part_seeds for group, rows in chosen.items() for name in rows}
    jobs: dict[str, list[Future[Found]]] = {name: [] for name in counts}
    for seed in range(max(counts.values())):
        for rows in chosen.values():
            for name, row in rows.items():
                if seed < counts[name]:
                    jobs[name].append(pool.submit(measure, work, name, row, seed))
    return {name: [job.result() for job in each] for name, each in jobs.items()}


def report(base: Found, found: dict[str, list[Found]], chosen: Chosen) -> Iterator[str]:
    """The results file, line by line."""
    yield from head(
        "A Video-Free LoRA in a toy",
        "One base; the seeds are those of the LoRA and of what it is shown. Judged on "
        f"{HELD_OUT} sprites that were never shown. {described(base)}",
    )
    yield ""
    yield from COLUMNS.splitlines()
    for group, rows in chosen.items():
        yield ""
        seeds = len(found[next(iter(rows))])
        yield f"## {group.capitalize()}: {'one seed' if seeds == 1 else f'{seeds} seeds'}"
        yield ""
        yield "| | true place % | tones % | pixels % | frame change % | path % | head % | off | share | s |"
        yield "|" + "---|" * 10
        for name in rows:
            yield f"| {name} | {' | '.join(cells(base, found[name]))} |"
        if group == "faults":
            yield ""
            yield from (f"- *{name}*: {what}." for name, what in FAULTS.items())


def described(base: Found) -> str:
    """The base's own figures."""
    mean = dict(zip(METRICS, base.metrics.mean(0).tolist(), strict=True))
    return (
        f"The base: true place {mean['place']:.5f}, tones {mean['tones']:.5f}, pixels {mean['pixels']:.5f}, frame "
        f"change {mean['change']:.4f}, path {mean['path']:.3f} of the true one, off {1e5 * mean['off']:.1f}."
    )


def cells(base: Found, found: list[Found]) -> list[str]:
    """The cells of a row."""
    names = {name: METRICS.index(name) for name in METRICS}
    of = {name: difference(base, found, at, relative=name in RELATIVE) for name, at in names.items()}
    off = statistics.mean(each.metrics[:, names["off"]].mean().item() for each in found)
    share = statistics.mean(each.share for each in found)
    shown = [of[name] for name in ("place", "tones", "pixels", "change", "path", "head")]
    return [
        *shown,
        f"{1e5 * off:.1f}",
        "" if share != share else f"{share:.2%}",
        f"{statistics.mean(each.seconds for each in found):.0f}",
    ]


def difference(base: Found, found: list[Found], at: int, relative: bool) -> str:
    """The paired difference of a metric in per cent: mean ± standard error over the sprites (each seed's)."""
    unit = base.metrics[:, at].mean() if relative else torch.tensor(1.0)
    per_seed: Tensor = torch.stack([each.metrics[:, at] - base.metrics[:, at] for each in found]) / unit * 100
    of_sprites = per_seed.mean(0)
    error = of_sprites.std() / len(of_sprites) ** 0.5
    seeds = ", ".join(f"{each:+.0f}" for each in per_seed.mean(1).tolist())
    digits = 0 if error >= 0.5 else 1
    return f"{of_sprites.mean():+.{digits}f} ± {error:.{digits}f} ({seeds})".replace("-", "−")


if __name__ == "__main__":
    main()
