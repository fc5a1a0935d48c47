"""docs/kvae.md explains what the package exports."""

import re

from conftest import ROOT
from kvae_comfyui import kvae


def test_every_public_name_is_in_the_docs():
    text = (ROOT / "docs" / "kvae.md").read_text(encoding="utf-8")
    assert [name for name in kvae.__all__ if not re.search(rf"\b{name}\b", text)] == []
