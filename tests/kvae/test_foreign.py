"""JSON from others gives the expected value or a ValueError, whatever it contains."""

from dataclasses import dataclass

import pytest

from kvae_comfyui.kvae.foreign import build, parse_json, parse_object


@dataclass
class Thing:
    name: str
    size: int | None
    weight: float = 1.0
    sides: tuple[int, ...] = ()
    done: bool = False


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, b"\xff", "9" * 5000, "nul"])
def test_bad_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_other_values_than_an_object_are_refused():
    assert parse_object('{"a": 1}') == {"a": 1}
    for text in ("[]", "null", "1", '"a"'):
        with pytest.raises(ValueError, match="expected an object"):
            parse_object(text)


def test_a_dataclass_is_built_and_unknown_fields_are_ignored():
    thing = build(Thing, {"name": "a", "size": None, "weight": 2, "sides": [1, 2], "future": {}})
    assert thing == Thing("a", None, 2, (1, 2))


@pytest.mark.parametrize(
    "values",
    [
        *(None, [], "text", 3, {}, {"name": "a"}, {"name": 1, "size": 1}, {"name": "a", "size": "1"}),
        *({"name": "a", "size": True}, {"name": "a", "size": 1, "weight": "2"}, {"name": "a", "size": 1, "done": 1}),
        *({"name": "a", "size": 1, "sides": 3}, {"name": "a", "size": 1, "sides": ["x"]}),
    ],
)
def test_missing_fields_and_wrong_types_are_a_value_error(values):
    with pytest.raises(ValueError):
        build(Thing, values)
