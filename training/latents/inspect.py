"""Say what latent files are: shape, decoded size, statistics, and the space they look like.

    python -m training inspect a.latent b.safetensors

It is the report of the node Inspect Latent. No VAE is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...serving.inspect import describe_file
from ..errors import printable
from ..options import argument
from .bulk import Bulk
from .options import ENDINGS, ReadingOptions, read
from .sources import find_files


@dataclass(kw_only=True)
class InspectConfig(ReadingOptions):
    files: list[str] = argument("latent files, and folders of them", "FILE")  # noqa: RUF009


def run(config: InspectConfig) -> int:
    """Print a block of lines for each file; return the exit code."""
    paths = [path for path, _ in find_files(config.files, ENDINGS)]
    bulk = Bulk("read", len(paths))
    for path in paths:
        with bulk.file(path):
            report = describe_file(read(path, config))
            print(f"{printable(str(path))}\n{report}\n", flush=True)
    return bulk.code()
