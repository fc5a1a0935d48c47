"""The report of an identity head's training: report.html, one page that needs no other file, and report.json."""

from __future__ import annotations

from html import escape
from typing import Any

from ...kvae.foreign import json_text
from ...kvae.paths import sha256_of, write_text
from ..evaluate.curves import png, points, subplots
from ..evaluate.page import document, facts_html, image_html, table_html
from ..evaluate.tables import Table
from ..runtime.log import read_log
from ..runtime.places import shareable
from .head_setup import HeadTraining

COLUMNS = {
    "loss": ("loss", ".3f"),
    "same": ("cosine of one identity", ".3f"),
    "same_median": ("median", ".3f"),
    "other": ("of two", ".3f"),
    "other_median": ("median", ".3f"),
    "gap": ("gap", ".3f"),
    "retrieval": ("nearest right", ".1%"),
    "threshold": ("threshold", ".3f"),
    "error": ("equal error", ".1%"),
}
PLACES = ("data_root", "output_root", "device")  # settings that the facts leave out
NOTE = (
    "Cosines between pictures of val, in batches. Nearest right: share of the pictures whose nearest other picture in "
    "the batch is of the same identity. Threshold: the cosine at which as large a share of the pairs of one identity "
    "is below as of the pairs of two is above; equal error: that share."
)


def write_report(training: HeadTraining) -> None:
    """Write both files.

    Raises:
        WeightsError: a file cannot be written.
    """
    report = summary(training)
    write_text(training.folder / "report.json", json_text(report, indent=1) + "\n")
    facts = [(key, str(value)) for key, value in report["facts"].items()]
    body = [
        "<h1>Identity head</h1>",
        f'<p class="verdict">{escape(report["verdict"])}</p>',
        *("<h2>Validation</h2>", f"<p>{escape(NOTE)}</p>", table_html(table(report["figures"]))),
        *("<h2>Curves</h2>", image_html(curves(report["curves"]), "loss and cosines over steps")),
        *("<h2>On what, and how</h2>", facts_html(facts)),
    ]
    write_text(training.folder / "report.html", document("Identity head", body))


def summary(training: HeadTraining) -> dict[str, Any]:
    """The report as data."""
    progress, train, val = training.trainer.progress, training.train.index, training.val.index
    settings = {key: value for key, value in shareable(training.config).items() if key not in PLACES and value != ""}
    facts = {
        "file": training.file("best").name,
        "sha256": sha256_of(training.file("best")),
        "backbone sha256": training.backbone.digest,
        "layers": " → ".join(map(str, training.head.dims)),
        "train": f"{train.counts.sum():,} pictures of {len(train.identities):,} identities",
        "val": f"{val.counts.sum():,} pictures of {len(val.identities):,} identities",
        "skipped": f"{len(training.skipped):,} pictures",
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
    }
    return {
        "verdict": verdict(progress.best),
        "figures": {
            "untrained": progress.first,
            f"best, step {progress.best['step']}": progress.best,
            f"last, step {training.trainer.step}": progress.last,
        },
        "facts": facts,
        "curves": read_log(training.file("log")),
    }


def verdict(best: dict[str, float]) -> str:
    """One sentence about the best head."""
    return (
        f"Two pictures of one identity have the cosine {best['same']:.3f} on average, of two identities "
        f"{best['other']:.3f}; {best['retrieval']:.1%} of the pictures are nearest to one of their own identity."
    )


def table(figures: dict[str, dict[str, float]]) -> Table:
    """The figures of each head, in rows."""
    rows = [["head", *(title for title, _ in COLUMNS.values())]]
    return rows + [
        [name, *(format(row[key], spec) for key, (_, spec) in COLUMNS.items())] for name, row in figures.items()
    ]


def curves(rows: list[dict[str, Any]]) -> bytes:
    """A plot of the losses, and one of the cosines, as PNG."""
    figure, axes = subplots(2, 6)
    shown = (("train_loss", "val_loss"), ("val_same", "val_other", "val_retrieval"))
    for each, keys, label in zip(axes, shown, ("loss", "cosine, share"), strict=True):
        for key in keys:
            if found := points(rows, key):
                each.plot(*zip(*found, strict=True), label=key.replace("_", " "))
        each.set(xlabel="step", ylabel=label)
        each.legend()
    return png(figure)
