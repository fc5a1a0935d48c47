"""Read JSON from outside, where any fault is a ValueError, and write JSON that every parser accepts."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
MAX_JSON_CHARACTERS = 64 << 20


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or is longer than MAX_JSON_CHARACTERS.
    """
    if len(text) > MAX_JSON_CHARACTERS:
        raise ValueError(f"{len(text)} characters of JSON; expected {MAX_JSON_CHARACTERS} at most")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON text that must be an object.

    Raises:
        ValueError: as `parse_json`; or the value is not an object.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}; expected an object")
    return value


def build(cls: type[T], values: Any) -> T:
    """Make a dataclass from a JSON object, checking every field against its declared type.

    Unknown fields, which a newer version may write, are ignored.

    Raises:
        ValueError: `values` is not an object, a field is missing or has another type, or the class rejects the values.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{_shown(values)}; expected an object with the fields of a {cls.__name__}")
    hints = get_type_hints(cls)
    known = {}
    for each in fields(cls):  # type: ignore[arg-type]
        if each.name in values:
            known[each.name] = _checked(each.name, values[each.name], hints[each.name])
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{cls.__name__} without {each.name}")
    return cls(**known)


def _checked(name: str, value: Any, hint: Any) -> Any:
    if not _fits(value, hint):
        raise ValueError(f"{name} is {_shown(value)}; expected {getattr(hint, '__name__', hint)}")
    return tuple(value) if get_origin(hint) is tuple else value


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Union or type(hint).__name__ == "UnionType":
        return any(_fits(value, each) for each in inner)
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(_fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text that every parser accepts. Letters are not escaped, and numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
