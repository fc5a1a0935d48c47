"""The report of a training or an evaluation: one page that needs no other file, the same as JSON, and a model card.

    report.html, report.json, model_card.md

Written by `train` with what latents say, on the validation pairs, and by `evaluate` with what pixels say too.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from ...adapters.files import load_adapter
from ...kvae import WeightsError
from ...kvae.foreign import json_text
from ...kvae.paths import sha256_of, write_text
from ..errors import UserError
from ..runtime.log import read_log

REPORT = ("report.html", "report.json", "model_card.md")
# of each direction: its name, its row of the pixel figures, and the rows of its baseline and of its limit
DIRECTIONS = {
    "h2k": ("H→K", "KVAE(H→K)", "KVAE(affine H→K)", "KVAE(pixel path)"),
    "k2h": ("K→H", "Hunyuan(K→H)", "Hunyuan(affine K→H)", "Hunyuan(pixel path)"),
}
PLACES = ("latent_root", "val_latent_root", "out_h2k", "out_k2h", "hunyuan_vae", "kvae", "device")  # of one machine
PARTS = {"train": ":", "val": "-"}  # of the pairs, and how their curves are drawn
MOST_DRAWN = 1e30  # beyond that matplotlib's scales overflow
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2em .9em .2em 0; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; white-space: pre; } th { font-weight: 600; color: #555; }
.facts td { text-align: left; overflow-wrap: anywhere; } .verdict { background: #f3f6ea; padding: .8em 1em; }
img { max-width: 100%; height: auto; } code { font-size: .9em; } figure { margin: 1em 0; }
"""


def write_report(
    folder: Path, adapters: dict[str, Path], result: dict[str, Any], log_file: Path, sheets: dict[str, Path]
) -> None:
    """Write all three files.

    Args:
        adapters: the file of each direction, "h2k" and "k2h".
        result: the figures, as `evaluate` finds them.
        log_file: the metrics of the training, where they are at hand.
        sheets: pictures to show, by title.
    """
    report = {
        "verdict": verdict(result),
        "adapters": {name: _about(path) for name, path in adapters.items()},
        "evaluation": result,
        "curves": _curves(log_file),
    }
    write_text(folder / "report.json", json_text(report, indent=1) + "\n")
    write_text(folder / "report.html", _page(report, {title: p.read_bytes() for title, p in sheets.items()}))
    write_text(folder / "model_card.md", model_card(report))


def _curves(log_file: Path) -> list[dict[str, Any]]:
    """The rows of a training's log; none where it is damaged: an adapter is what it is without them."""
    try:
        return [row for row in read_log(log_file) if isinstance(row, dict)]
    except (UserError, WeightsError, OSError, ValueError):
        return []


def verdict(result: dict[str, Any]) -> str:
    """One sentence: what each adapter reaches, beside the affine map and the pixel path."""
    parts = []
    for name, row, affine, limit in DIRECTIONS.values():
        latent = result["latent"]["figures"]
        share = f"{name} leaves {latent[name]['share']:.1%} of the target's variance"
        if f"{name} affine" in latent:
            share += f" ({latent[f'{name} affine']['share']:.1%} with the affine map)"
        pixel = result.get("pixel", {}).get("figures")
        if pixel:
            psnr = pixel[row]["psnr"]
            share += f" and decodes to {psnr:.2f} dB, {_beside(psnr - pixel[limit]['psnr'])} the pixel path"
            share += f" and {_beside(psnr - pixel[affine]['psnr'])} the affine map"
        parts.append(share)
    return "; ".join(parts) + "."


def _beside(difference: float) -> str:
    return f"{abs(difference):.2f} dB {'above' if difference >= 0 else 'below'}"


def model_card(report: dict[str, Any]) -> str:
    """The text of a README.md for a hub repository with both adapters."""
    about = report["adapters"]
    lines = [
        "---",
        "library_name: kvae",
        "tags: [video, vae, latent-adapter]",
        "---",
        "",
        f"# Latent adapters {about['h2k']['source']} ↔ {about['h2k']['target']}",
        "",
        report["verdict"],
        "",
        "Raw latents to raw latents, before any scaling factor. In ComfyUI they go into `models/latent_adapters`.",
        "",
        "| file | maps | network | weights | sha256 |",
        "|---|---|---|---|---|",
    ]
    for each in about.values():
        network = f"{each['network']} | {each['weights']:,} | {each['sha256']}"
        lines.append(f"| {each['file']} | {each['source']} → {each['target']} | {network} |")
    lines += ["", "## Trained on", ""]
    lines += [f"- {key}: {value}" for key, value in _facts(about["h2k"])]
    lines += ["", "## Evaluation", "", *_markdown(_latent_table(report["evaluation"]))]
    if "pixel" in report["evaluation"]:
        lines += ["", *_markdown(_pixel_table(report["evaluation"]))]
    return "\n".join(lines) + "\n"


def _about(path: Path) -> dict[str, Any]:
    adapter = load_adapter(path)
    return {
        "file": path.name,
        "sha256": sha256_of(path),
        "source": adapter.source.name,
        "target": adapter.target.name,
        "network": type(adapter.network).__name__,
        "weights": sum(parameter.numel() for parameter in adapter.network.parameters()),
        "training": adapter.training_info,
        "metrics": adapter.metrics,
    }


def _facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What an adapter was trained on and how, as lines."""
    training = _object(about["training"])
    if not training:
        return [("training", "the file does not say")]
    facts: list[tuple[str, str]] = [
        (key, str(training[key])) for key in ("pairs", "pairs_sha256", "steps", "seconds") if key in training
    ]
    extraction = _object(training.get("extraction"))
    for vae in ("hunyuan_vae", "kvae"):
        made_with = _object(extraction.get(vae))
        if made_with:
            facts.append((vae, f"{made_with.get('space')}, sha256 {made_with.get('sha256')}"))
    made_by = {"extraction": _object(extraction.get("settings")), "training": _object(training.get("config"))}
    for title, settings in made_by.items():
        shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in PLACES and value != "")
        facts.append((f"settings of {title}", shown or "not said"))
    return facts


def _object(value: Any) -> dict[str, Any]:
    """What another version, or somebody else, has put where we write an object."""
    return value if isinstance(value, dict) else {}


Table = list[list[str]]  # the first row is the head


def _latent_table(result: dict[str, Any]) -> Table:
    rows = [["latents", "MSE", "of variance"]]
    return rows + [
        [name, f"{row['mse']:.4f}", f"{row['share']:.2%}"] for name, row in result["latent"]["figures"].items()
    ]


def _pixel_table(result: dict[str, Any]) -> Table:
    columns = {"psnr": "PSNR dB", "ssim": "SSIM", "flicker": "flicker", "psnr_source": "PSNR source dB"}
    rows = [["pixels", *columns.values()]]
    for name, row in result["pixel"]["figures"].items():
        cells = [f"{row[key]:.4f}" if key == "ssim" else f"{row[key]:.2f}" if key in row else "" for key in columns]
        rows.append([name, *cells])
    return rows


def _worst_table(result: dict[str, Any]) -> Table:
    rows = [["latents of", "direction", "MSE", "of variance"]]
    for direction, clips in result["latent"]["worst"].items():
        rows += [[clip["clip"], direction, f"{clip['mse']:.4f}", f"{clip['share']:.2%}"] for clip in clips]
    return rows


def _lost_table(result: dict[str, Any]) -> Table:
    rows = [["pixels of", "PSNR lost by the adapter"]]
    return rows + [[clip["clip"], f"{clip['lost']:.2f} dB"] for clip in result["pixel"]["worst"]]


def _markdown(table: Table) -> list[str]:
    head, *rows = ("| " + " | ".join(row) + " |" for row in table)
    return [head, "|" + "---|" * len(table[0]), *rows]


def _page(report: dict[str, Any], sheets: dict[str, bytes]) -> str:
    """The page. Everything that came from a file's name or metadata is escaped."""
    about, result = report["adapters"], report["evaluation"]
    title = f"{about['h2k']['source']} ↔ {about['h2k']['target']}"
    body = [f"<h1>Latent adapters {escape(title)}</h1>", f'<p class="verdict">{escape(report["verdict"])}</p>']
    body += ["<h2>What was trained</h2>"]
    for each in about.values():
        name = f"{each['source']} → {each['target']}, {each['network']}, {each['weights']:,} weights"
        body.append(_html_facts([("adapter", name), ("file", each["file"]), ("sha256", each["sha256"])]))
    body += ["<h2>On what, and how</h2>", _html_facts(_facts(about["h2k"]))]
    body += ["<h2>Evaluation</h2>", _note(result), _html_table(_latent_table(result))]
    if "pixel" in result:
        body += ["<p></p>", _html_table(_pixel_table(result))]
    if any(_points(report["curves"], f"{part}_{name}") for part in PARTS for name in DIRECTIONS):
        body += ["<h2>Curves</h2>", _image(curves_png(report["curves"]), "latent MSE over steps")]
    for name, data in sheets.items():
        body += [f"<h2>{escape(name)}</h2>", _image(data, name)]
    body += ["<h2>Worst clips</h2>", _html_table(_worst_table(result))]
    if "pixel" in result:
        body += ["<p></p>", _html_table(_lost_table(result))]
    body += ["<h2>Latent channels</h2>", _image(channels_png(result["latent"]["channels"]), "latent channels")]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _note(result: dict[str, Any]) -> str:
    text = f"{result['latent']['pairs']} pairs in latents"
    if "pixel" in result:
        text += (
            f", {result['pixel']['clips']} clips in pixels. Hunyuan and KVAE are each VAE alone; the affine map is the "
            "baseline of the adapter above it, and the pixel path (decode with one VAE, encode with the other) what it "
            "replaces. PSNR source: against what the source VAE decodes from the same latent"
        )
    return f"<p>{escape(text)}.</p>"


def _html_facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = (f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in facts)
    return f'<table class="facts">{"".join(rows)}</table>'


def _html_table(table: Table) -> str:
    head, *rows = table
    cells = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def _image(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}"></figure>'


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and values of one curve."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and abs(value) < MOST_DRAWN and math.isfinite(value)

    return [(row["step"], row[key]) for row in rows if number(row.get("step")) and number(row.get(key))]


def curves_png(rows: list[dict[str, Any]]) -> bytes:
    """The training curve: MSE of both directions over steps, on the training and the validation pairs."""
    figure, axes = _subplots(1, 4)
    for name, label, color in (("h2k", "H→K", "tab:blue"), ("k2h", "K→H", "tab:orange")):
        for part, style in PARTS.items():
            points = _points(rows, f"{part}_{name}")
            if points:
                axes[0].plot(*zip(*points, strict=True), style, color=color, label=f"{label} {part}")
    axes[0].set(xlabel="step", ylabel="latent MSE", yscale="log")
    axes[0].legend()
    return _png(figure)


def channels_png(channels: dict[str, list[float]]) -> bytes:
    """Mean and deviation of every channel of both spaces, and what part of its variance each adapter leaves."""
    figure, axes = _subplots(2, 5)
    for space, color in (("z_h", "tab:blue"), ("z_k", "tab:orange")):
        mean, std = channels[f"{space} mean"], channels[f"{space} std"]
        axes[0].errorbar(range(len(mean)), mean, std, fmt="o", ms=3, color=color, label=f"{space}: mean ± deviation")
    for name, color in (("H→K", "tab:blue"), ("K→H", "tab:orange")):
        share = channels[f"{name} share"]
        axes[1].plot(range(len(share)), share, "o-", ms=3, color=color, label=f"{name}: error, of variance")
    axes[1].set(xlabel="channel", ylim=(0, None))
    for each in axes:
        each.legend()
    return _png(figure)


def _subplots(rows: int, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, figsize=(8, height), layout="constrained", squeeze=False)
    return figure, list(axes[:, 0])


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    plt.close(figure)
    return buffer.getvalue()
