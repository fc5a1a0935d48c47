"""The results of `evaluate --latents` as text, report.json and report.html."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ...kvae.foreign import json_text
from ...kvae.paths import write_text
from .curves import spectrum_png
from .page import SPECTRUM, document, facts_html, image_html, table_html
from .report import about_adapter, training_facts
from .tables import Table

COLUMNS = {
    "psnr_source": ("PSNR source dB", 2), "ssim": ("SSIM", 4), "flicker": ("flicker", 2), "sharpness": ("sharpness", 3),
    "red": ("red", 2), "green": ("green", 2), "blue": ("blue", 2),
}  # fmt: skip
NOTE = (
    "HunyuanVideo's own decode of each latent is the reference for KVAE's decode through H→K. Flicker: root mean "
    "square of the change of the difference from frame to frame, in 0..255. Sharpness: root mean square of the "
    "differences between neighbouring pixels, divided by the reference's; below 1 is softer. Red, green, blue: mean "
    "difference, in 0..255."
)
MOST_ROWS = 100  # of clips on the page, those with the lowest PSNR; report.json has all


def write_report(folder: Path, adapter: Path, result: dict[str, Any], sheets: dict[str, Path]) -> None:
    """Write report.html and report.json.

    Args:
        result: from `Judged.result`.
        sheets: PNG files to show, by title.
    """
    about = about_adapter(adapter)
    report = {"verdict": verdict(result), "adapters": {"h2k": about}, "evaluation": {"generated": result}}
    write_text(folder / "report.json", json_text(report, indent=1) + "\n")
    title = f"Generated latents through {about['source']} → {about['target']}"
    name = f"{about['network']}, {about['weights']:,} weights"
    facts = [("adapter", name), ("file", about["file"]), ("sha256", about["sha256"])]
    body = [f"<h1>{escape(title)}</h1>", f'<p class="verdict">{escape(verdict(result))}</p>']
    body += ["<h2>The adapter</h2>", facts_html(facts), facts_html(training_facts(about))]
    body += ["<h2>Generated latents</h2>", f"<p>{escape(NOTE)}</p>", table_html(clip_table(result, MOST_ROWS))]
    for name, path in sheets.items():
        body += [f"<h2>{escape(name)}</h2>", image_html(path.read_bytes(), name)]
    body += ["<h2>Worst frames</h2>", table_html(frame_table(result))]
    figure = spectrum_png({"pixel": {"KVAE(H→K)": result["spectrum"]}})
    body += ["<h2>Errors by spatial frequency</h2>", f"<p>{SPECTRUM}</p>", image_html(figure, "errors by frequency")]
    write_text(folder / "report.html", document(title, body))


def verdict(result: dict[str, Any]) -> str:
    """One sentence: how far KVAE's decodes are from the model's own VAE's."""
    mean = result["figures"]
    shift = max((mean[channel] for channel in ("red", "green", "blue")), key=abs)
    clips = f"{len(result['clips'])} generated clip{'s' if len(result['clips']) > 1 else ''}"
    return (
        f"Over {clips}, KVAE through H→K decodes to {mean['psnr_source']:.2f} dB from HunyuanVideo's own decode, with "
        f"{mean['sharpness']:.3f} of its sharpness, a flicker of {mean['flicker']:.2f} and a mean colour shift of at "
        f"most {shift:+.2f} of 255."
    )


def clip_table(result: dict[str, Any], most: int | None = None) -> Table:
    """The means, and the figures of each clip, those with the lowest PSNR first."""
    clips = sorted(result["clips"], key=lambda clip: clip["psnr_source"])[:most]
    rows = [["clip", *(head for head, _ in COLUMNS.values())]]
    for clip in [{"clip": "mean over clips", **result["figures"]}, *clips]:
        rows.append([clip["clip"], *(f"{clip[key]:.{digits}f}" for key, (_, digits) in COLUMNS.items())])
    return rows


def frame_table(result: dict[str, Any]) -> Table:
    """The frames that differ most."""
    rows = [["clip", "frame", "PSNR source dB"]]
    return rows + [[each["clip"], str(each["frame"]), f"{each['psnr_source']:.2f}"] for each in result["worst"]]


def plain_text(result: dict[str, Any]) -> str:
    """The verdict and the figures of each clip, for a terminal."""
    table = clip_table(result)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([f"{row[0]:<{widths[0]}}", *(map(str.rjust, row[1:], widths[1:]))]) for row in table]
    return "\n".join([verdict(result), "", *lines]) + "\n"
