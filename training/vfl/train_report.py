"""The report of a LoRA's training: report.html, one page that needs no other file, and report.json."""

from __future__ import annotations

from html import escape
from typing import Any

from ...kvae.foreign import json_text
from ...kvae.paths import write_text
from ..evaluate.curves import png, points, subplots
from ..evaluate.page import document, facts_html, image_html, table_html
from ..evaluate.tables import Table
from ..runtime.log import read_log
from ..runtime.places import shareable
from .training import LoraTraining

ROWS = {  # of the table: the student's figure, the base's
    "identity, by the head": ("identity", "base_identity", ".3f"),
    "identity, by features that the loss does not see": ("second", "base_second", ".3f"),
    "motion, mean change from frame to frame": ("motion", "base_motion", ".4f"),
    "change against the base": ("change", "", ".4f"),
    "change at the border, where the subject seldom is": ("border_change", "", ".4f"),
    "distillation error, of the flow": ("drift", "", ".3%"),
}
PLACES = ("data_root", "cache_root", "output_root", "device", "plan")  # settings that the facts leave out
NOTE = (
    "The same clips, from the same noise, with the LoRA and without it: estimates of the clip from the middle of the "
    "identity loss's steps, not whole generations. Identity: cosine with the picture of the character. A LoRA is good "
    "if both identities rise, and motion stays near that of the base."
)


def write_report(training: LoraTraining) -> None:
    """Write both files.

    Raises:
        WeightsError: a file cannot be written.
    """
    report = summary(training)
    write_text(training.folder / "report.json", json_text(report, indent=1) + "\n")
    facts = [(key, str(value)) for key, value in report["facts"].items()]
    body = [
        "<h1>Video-Free LoRA</h1>",
        f'<p class="verdict">{escape(report["verdict"])}</p>',
        *("<h2>Validation</h2>", f"<p>{escape(NOTE)}</p>", table_html(table(report["figures"]))),
        *("<h2>Curves</h2>", image_html(curves(report["curves"]), "losses and figures of validation over steps")),
        *("<h2>On what, and how</h2>", facts_html(facts)),
    ]
    write_text(training.folder / "report.html", document("Video-Free LoRA", body))


def summary(training: LoraTraining) -> dict[str, Any]:
    """The report as data."""
    trainer, train, val = training.trainer, training.train.index, training.val.index
    settings = {key: value for key, value in shareable(training.config).items() if key not in PLACES and value != ""}
    facts = {
        "files": f"step-{trainer.step}",
        "LoRA": f"{len(trainer.parameters) // 2} layers, {sum(p.numel() for p in trainer.parameters):,} weights",
        "train": f"{train.counts.sum():,} pictures of {len(train.identities):,} identities",
        "val": f"{val.counts.sum():,} pictures of {len(val.identities):,} identities",
        "skipped": f"{len(training.skipped):,} pictures",
        "settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
    }
    return {
        "verdict": verdict(trainer.progress.last),
        "figures": trainer.progress.last,
        "facts": facts,
        "curves": read_log(training.file("log")),
    }


def verdict(last: dict[str, float]) -> str:
    """One sentence about the LoRA."""
    return (
        f"Identity {last['base_identity']:.3f} → {last['identity']:.3f} by the head, {last['base_second']:.3f} → "
        f"{last['second']:.3f} by features that the loss does not see; motion {last['motion_ratio']:.2f} of the base's."
    )


def table(last: dict[str, float]) -> Table:
    """The figures of the last validation, with the LoRA and without it."""
    rows = [["", "with the LoRA", "base"]]
    return rows + [
        [name, format(last[ours], spec), format(last[base], spec) if base else ""]
        for name, (ours, base, spec) in ROWS.items()
    ]


def curves(rows: list[dict[str, Any]]) -> bytes:
    """A plot of the losses, one of identities, and one of motion, as PNG."""
    figure, axes = subplots(3, 8)
    shown = {
        "share of the flow": ("drift", "val_drift"),
        "identity": ("val_identity", "val_base_identity", "val_second", "val_base_second"),
        "share of the base's motion": ("val_motion_ratio",),
    }
    for each, (label, keys) in zip(axes, shown.items(), strict=True):
        for key in keys:
            if found := points(rows, key):
                each.plot(*zip(*found, strict=True), label=key.replace("_", " "))
        each.set(xlabel="step", ylabel=label)
        if each.lines:
            each.legend()
    return png(figure)
