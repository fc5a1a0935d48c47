"""The workflow, for the metadata of files: dropping such a file on the page restores the workflow."""

from __future__ import annotations

import json

from comfy.cli_args import args
from comfy_api.latest import io


def workflow_of(node: type[io.ComfyNode]) -> dict[str, str]:
    """Prompt and workflow of the running node as JSON texts; empty if ComfyUI runs with --disable-metadata."""
    if args.disable_metadata:
        return {}
    known = {"prompt": node.hidden.prompt, **(node.hidden.extra_pnginfo or {})}
    return {key: json.dumps(value) for key, value in known.items() if value is not None}
