"""The page of generated videos: index.html, beside the videos."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...kvae.paths import write_text
from ..evaluate.page import document, facts_html, table_html

COLUMNS = {
    "base_motion": ("motion, base", ".2f"),
    "motion": ("LoRA", ".2f"),
    "base_identity": ("identity, base", ".3f"),
    "identity": ("LoRA", ".3f"),
}
NOTE = (
    "Left the base, right the same with the LoRA, from the same noise. Motion: mean change from frame to frame, in "
    "levels of 255. Identity: mean cosine between the frames after the first and the picture, by the head."
)
PLACES = ("pictures", "output_root", "device")  # settings that the facts leave out


def write_report(
    folder: Path, settings: Mapping[str, Any], digest: str, found: Mapping[str, Mapping[str, float]]
) -> Path:
    """Write the page, and return its path.

    Args:
        settings: of the command, as people may see them.
        digest: of the LoRA.
        found: figures of each video, by its name.

    Raises:
        WeightsError: it cannot be written.
    """
    shown = {key: about for key, about in COLUMNS.items() if all(key in row for row in found.values())}
    rows = [["video", *(title for title, _ in shown.values())]]
    rows += [[name, *(format(row[key], spec) for key, (_, spec) in shown.items())] for name, row in found.items()]
    facts = [(key, str(value)) for key, value in settings.items() if key not in PLACES and value != ""]
    body = ["<h1>Base and LoRA</h1>", f"<p>{escape(NOTE)}</p>", table_html(rows)]
    for name in found:
        source = escape(quote(name), quote=True)
        body += [f"<h2>{escape(name)}</h2>", f'<video controls loop muted src="{source}" width="100%"></video>']
    body += ["<h2>How</h2>", facts_html([*facts, ("LoRA sha256", digest)])]
    page = folder / "index.html"
    write_text(page, document("Base and LoRA", body))
    return page
