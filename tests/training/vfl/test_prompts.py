"""Prompts from a bank: a function of seed and number, all of them reached, and faults that name the file."""

import itertools
import json
from collections import Counter

import pytest

from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl.prompts import PromptBank

LISTS = {"character": ["A", "B"], "motion": ["runs", 'says "hi {there}"', "sits"], "camera": ["Still"]}


def bank(tmp_path, content) -> PromptBank:
    path = tmp_path / "bank.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return PromptBank(path)


def test_prompts_are_chosen_uniformly_and_independently(tmp_path):
    ours = bank(tmp_path, LISTS)
    expected = [f"{a} {b}. {c}." for a, b, c in itertools.product(*LISTS.values())]
    assert sorted(ours.prompts()) == sorted(expected) and len(ours) == 6
    counts = Counter(ours.prompt(0, k) for k in range(6000))
    assert counts.keys() == set(expected)
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 5 + 4 * 10**0.5
    assert [ours.prompt(7, k) for k in range(50)] == [bank(tmp_path, LISTS).prompt(7, k) for k in range(50)]
    assert [ours.prompt(7, k) for k in range(50)] != [ours.prompt(8, k) for k in range(50)]


def test_a_template_of_ones_own(tmp_path):
    ours = bank(tmp_path, {"template": "{who}, {{so}} {who}!", "who": ["x"]})
    assert list(ours.prompts()) == ["x, {so} x!"] == [ours.prompt(0, 0)]


def test_the_bank_that_comes_with_the_code():
    ours = PromptBank()
    prompts = list(ours.prompts())
    assert len(set(prompts)) == len(ours) > 100
    assert all(p.endswith(".") and "  " not in p and ".." not in p and '"' not in p for p in prompts)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "a JSON list; expected an object"),
        ("{", "Expecting property name"),
        (LISTS | {"motion": []}, "no texts for {motion}"),
        ({"character": ["A"], "motion": ["B"]}, "no texts for {camera}"),
        (LISTS | {"motions": ["B"]}, "a list 'motions' that its template does not use"),
        (LISTS | {"template": "{character} {dance}", "dance": "waltz"}, "no texts for {dance}"),
        (LISTS | {"template": "{character.__class__}"}, "the field 'character.__class__'"),
        (LISTS | {"template": "{character!r}"}, "expected a name in braces"),
        (LISTS | {"template": "{character:>999999999}"}, "expected a name in braces"),
        (LISTS | {"template": "{}"}, "expected a name in braces"),
        (LISTS | {"template": "a { b"}, "not a bank of prompts"),
        (LISTS | {"template": "no field"}, "has no field"),
        (LISTS | {"template": 3}, "no text"),
        (LISTS | {"camera": ["Still", ""]}, "in the list 'camera': ''"),
        (LISTS | {"camera": ["Still", 5]}, "in the list 'camera': '5'"),
        (LISTS | {"camera": ["x" * 5000]}, "expected a text of 1 to 4000"),
    ],
)
def test_a_fault_names_the_file(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        bank(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path}/bank.json: ") and words in str(error.value)
    assert "\n" not in str(error.value)
