"""Prompts made from a bank: a template, and a list of texts for each of its fields.

    {"template": "{character} {motion}. {camera}.", "character": [...], "motion": [...], "camera": [...]}

Text in quotes reaches the network's encoder of glyphs, as everywhere in HunyuanVideo 1.5.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...kvae.foreign import parse_object
from ...kvae.paths import read_text
from ..errors import UserError
from .draws import Draws

BANK = Path(__file__).with_name("prompt_bank.json")  # comes with the code
TEMPLATE = "{character} {motion}. {camera}."
MOST_CHARACTERS = 4000  # of a text or the template; the text encoder reads 1000 tokens


class PromptBank:
    """The prompts of a training.

    Args:
        path: a JSON file; the bank that comes with the code by default.

    Raises:
        UserError: not a bank: names the file and what is wrong in it.
        WeightsError: the file cannot be read.
    """

    def __init__(self, path: str | Path = BANK):
        text = read_text(path)
        try:
            bank = parse_object(text)
            self._parts = _parsed(bank.pop("template", TEMPLATE))
            self._lists = {field: _texts(field, bank) for _, field in self._parts if field}
            for field in bank.keys() - self._lists.keys():
                raise ValueError(f"a list {field!r} that its template does not use")
        except ValueError as error:
            raise UserError(f"{path}: not a bank of prompts ({error}); correct it") from None

    def __len__(self) -> int:
        return math.prod(len(texts) for texts in self._lists.values())

    def prompt(self, seed: int, k: int) -> str:
        """The prompt of sample `k`: each field's text is chosen uniformly, whatever the others are."""
        draws = Draws(seed, "prompt", k)
        return self._filled({field: texts[draws.below(len(texts))] for field, texts in self._lists.items()})

    def prompts(self) -> Iterator[str]:
        """All prompts that `prompt` can give, for the cache of texts."""
        for texts in itertools.product(*self._lists.values()):
            yield self._filled(dict(zip(self._lists, texts, strict=True)))

    def _filled(self, texts: dict[str, str]) -> str:
        return "".join(literal + texts.get(field, "") for literal, field in self._parts)


def _parsed(template: object) -> list[tuple[str, str]]:
    """The parts of a template: a literal text, and the field after it, "" if none.

    Raises:
        ValueError: not a template, or one without a field.
    """
    if not isinstance(template, str) or len(template) > MOST_CHARACTERS:
        raise ValueError(f"its template is no text of at most {MOST_CHARACTERS} characters")
    parts = []
    for literal, field, form, conversion in string.Formatter().parse(template):
        if field is not None and (not field.isidentifier() or form or conversion):
            raise ValueError(f"its template has the field {field!r}; expected a name in braces")
        parts.append((literal, field or ""))
    if not any(field for _, field in parts):
        raise ValueError(f"its template {template!r} has no field")
    return parts


def _texts(field: str, bank: dict[str, Any]) -> list[str]:
    """The list of a field.

    Raises:
        ValueError: there is none, it is empty, or something in it is not a text.
    """
    texts = bank.get(field)
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"no texts for {{{field}}}; expected a list {field!r}")
    for text in texts:
        if not isinstance(text, str) or not text.strip() or len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"in the list {field!r}: {str(text)[:40]!r}; expected a text of 1 to {MOST_CHARACTERS} letters"
            )
    return texts
