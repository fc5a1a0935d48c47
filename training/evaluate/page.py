"""The report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from typing import Any

from .curves import channels_png, curves_png, has_curves, spectrum_png
from .tables import Table, latent_table, lost_table, pixel_table, worst_table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2em .9em .2em 0; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; white-space: pre; } th { font-weight: 600; color: #555; }
.facts td { text-align: left; overflow-wrap: anywhere; } .verdict { background: #f3f6ea; padding: .8em 1em; }
img { max-width: 100%; height: auto; } code { font-size: .9em; } figure { margin: 1em 0; }
"""
SPECTRUM = (
    "Squared error divided by the target's power, from smooth areas (left) to the finest detail. Latents: against the "
    "target's latents. Pixels: against what the source VAE decodes from the same latent. 1 and above: nothing is kept."
)


def html_page(report: dict[str, Any], facts: list[tuple[str, str]], sheets: dict[str, bytes]) -> str:
    """The page, as HTML. Text from file names and metadata is escaped.

    Args:
        report: as in report.json.
        facts: what the adapters were trained on, and how.
        sheets: PNG files, by title.
    """
    about, result = report["adapters"], report["evaluation"]
    title = f"Latent adapters {about['h2k']['source']} ↔ {about['h2k']['target']}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="verdict">{escape(report["verdict"])}</p>']
    body += ["<h2>What was trained</h2>"]
    for each in about.values():
        name = f"{each['source']} → {each['target']}, {each['network']}, {each['weights']:,} weights"
        body.append(facts_html([("adapter", name), ("file", each["file"]), ("sha256", each["sha256"])]))
    body += ["<h2>On what, and how</h2>", facts_html(facts)]
    body += ["<h2>Evaluation</h2>", f"<p>{escape(_note(result))}</p>", table_html(latent_table(result))]
    if "pixel" in result:
        body += ["<p></p>", table_html(pixel_table(result))]
    if has_curves(report["curves"]):
        body += ["<h2>Curves</h2>", image_html(curves_png(report["curves"]), "latent MSE over steps")]
    for name, data in sheets.items():
        body += [f"<h2>{escape(name)}</h2>", image_html(data, name)]
    body += ["<h2>Worst clips</h2>", table_html(worst_table(result))]
    if "pixel" in result:
        body += ["<p></p>", table_html(lost_table(result))]
    body += ["<h2>Latent channels</h2>", image_html(channels_png(result["latent"]["channels"]), "latent channels")]
    spectra = {unit: result[unit]["spectrum"] for unit in ("latent", "pixel") if unit in result}
    body += ["<h2>Errors by spatial frequency</h2>", f"<p>{SPECTRUM}</p>"]
    body += [image_html(spectrum_png(spectra), "errors by spatial frequency")]
    return document(title, body)


def document(title: str, body: Iterable[str]) -> str:
    """A whole page, from the HTML of its parts."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _note(result: dict[str, Any]) -> str:
    text = f"{result['latent']['pairs']} pairs in latents"
    if "pixel" not in result:
        return text + "."
    return text + (
        f", {result['pixel']['clips']} clips in pixels. Hunyuan and KVAE: each VAE alone. Affine: the closed-form "
        "baseline of the adapter. Pixel path: decode with one VAE, encode with the other, which the adapter replaces. "
        "PSNR source: against what the source VAE decodes from the same latent."
    )


def facts_html(facts: Iterable[tuple[str, str]]) -> str:
    """Keys and values, escaped, one pair in a row."""
    rows = (f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in facts)
    return f'<table class="facts">{"".join(rows)}</table>'


def table_html(table: Table) -> str:
    """A table of text, escaped."""
    head, *rows = table
    cells = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def image_html(png: bytes, alt: str) -> str:
    """A PNG file, inside the page."""
    data = base64.b64encode(png).decode()
    return f'<figure><img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}"></figure>'
