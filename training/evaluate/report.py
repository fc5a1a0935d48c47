"""The report of a training or an evaluation: report.html (one page), report.json (the same as data), model_card.md.

`train` writes it with errors in latents, on the validation pairs; `evaluate` adds the quality in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...adapters.files import load_adapter
from ...adapters.networks import network_name
from ...kvae import WeightsError
from ...kvae.foreign import json_text
from ...kvae.paths import sha256_of, write_text
from ..directions import DIRECTIONS
from ..errors import UserError
from ..runtime.log import read_log
from .page import html_page
from .tables import latent_table, markdown, pixel_table

REPORT = ("report.html", "report.json", "model_card.md")
# settings that say where something was on one machine; facts leave them out
PLACES = ("latent_root", "val_latent_root", "out_h2k", "out_k2h", "hunyuan_vae", "kvae", "device")


def write_report(
    folder: Path, adapters: dict[str, Path], result: dict[str, Any], log_file: Path, sheets: dict[str, Path]
) -> None:
    """Write all three files.

    Args:
        adapters: the file of each direction, "h2k" and "k2h".
        result: results of the evaluation: "latent", from `latent_metrics`, and perhaps "pixel", from `pixel_metrics`.
        log_file: the log of the training, which may be missing.
        sheets: PNG files to show, by title.
    """
    report: dict[str, Any] = {
        "verdict": verdict(result),
        "adapters": {name: about_adapter(path) for name, path in adapters.items()},
        "evaluation": result,
        "curves": _log_rows(log_file),
    }
    pictures = {title: path.read_bytes() for title, path in sheets.items()}
    write_text(folder / "report.json", json_text(report, indent=1) + "\n")
    write_text(folder / "report.html", html_page(report, training_facts(report["adapters"]["h2k"]), pictures))
    write_text(folder / "model_card.md", model_card(report))


def verdict(result: dict[str, Any]) -> str:
    """One sentence: what each adapter reaches, compared with the affine map and the pixel path."""
    latent = result["latent"]["figures"]
    pixel = result["pixel"]["figures"] if "pixel" in result else None
    parts = []
    for direction in DIRECTIONS.values():
        arrow, decoder = direction.arrow, direction.decoder
        part = f"{arrow} leaves {latent[arrow]['share']:.1%} of the target's variance"
        if f"{arrow} affine" in latent:
            part += f" ({latent[f'{arrow} affine']['share']:.1%} with the affine map)"
        if pixel:
            psnr = pixel[f"{decoder}({arrow})"]["psnr"]
            part += f" and decodes to {psnr:.2f} dB"
            part += f", {_compared(psnr - pixel[f'{decoder}(pixel path)']['psnr'])} the pixel path"
            part += f" and {_compared(psnr - pixel[f'{decoder}(affine {arrow})']['psnr'])} the affine map"
        parts.append(part)
    return "; ".join(parts) + "."


def _compared(difference: float) -> str:
    return f"{abs(difference):.2f} dB {'above' if difference >= 0 else 'below'}"


def model_card(report: dict[str, Any]) -> str:
    """The README.md of a hub repository with both adapters."""
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
        "The adapters map raw latents to raw latents, without scaling factors. In ComfyUI, put them into "
        "`models/latent_adapters`.",
        "",
        "| file | maps | network | weights | sha256 |",
        "|---|---|---|---|---|",
    ]
    for each in about.values():
        network = f"{each['network']} | {each['weights']:,} | {each['sha256']}"
        lines.append(f"| {each['file']} | {each['source']} → {each['target']} | {network} |")
    lines += ["", "## Trained on", ""]
    lines += [f"- {key}: {value}" for key, value in training_facts(about["h2k"])]
    lines += ["", "## Evaluation", "", *markdown(latent_table(report["evaluation"]))]
    if "pixel" in report["evaluation"]:
        lines += ["", *markdown(pixel_table(report["evaluation"]))]
    return "\n".join(lines) + "\n"


def training_facts(about: dict[str, Any]) -> list[tuple[str, str]]:
    """What an adapter was trained on, and how, as keys and values to read."""
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


def about_adapter(path: Path) -> dict[str, Any]:
    """What an adapter file says of itself, for a report."""
    adapter = load_adapter(path)
    return {
        "file": path.name,
        "sha256": sha256_of(path),
        "source": adapter.source.name,
        "target": adapter.target.name,
        "network": network_name(adapter.network).capitalize(),
        "weights": sum(parameter.numel() for parameter in adapter.network.parameters()),
        "training": adapter.training_info,
        "metrics": adapter.metrics,
    }


def _log_rows(log_file: Path) -> list[dict[str, Any]]:
    """The rows of a training's log; none if it is damaged, since a report does not depend on it."""
    try:
        return [row for row in read_log(log_file) if isinstance(row, dict)]
    except (UserError, WeightsError, OSError, ValueError):
        return []


def _object(value: Any) -> dict[str, Any]:
    """The value if it is an object, as we write it; other versions and other people may write anything."""
    return value if isinstance(value, dict) else {}
