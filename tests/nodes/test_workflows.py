"""The workflows and blueprints as files: their nodes stand apart, and their notes speak three languages."""

import json
import re
from itertools import combinations

import pytest

from conftest import ROOT

PATHS = [path for folder in ("example_workflows", "subgraphs") for path in sorted((ROOT / folder).glob("*.json"))]
TITLE = 30  # a node's title bar is above its position
APART = 60
PICTURE = 300  # by which a node grows, or less, that shows pictures while it works


def graphs(path):
    """A workflow and its subgraphs."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def gap(one, other):
    """Pixels between two nodes, title bars included: the larger of across and down; negative where they overlap."""
    (x, y), (width, height) = one["pos"], one["size"]
    (u, v), (wide, high) = other["pos"], other["size"]
    return max(u - x - width, x - u - wide, v - TITLE - y - height, y - TITLE - v - high)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_nodes_stand_60_pixels_apart(path):
    """Pages differ in the height of a node by some 20 pixels."""
    for graph in graphs(path):
        for one, other in combinations(graph["nodes"], 2):
            assert gap(one, other) >= APART, f"{one['type']} {one['id']} and {other['type']} {other['id']}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_pictures_of_a_running_node_cover_no_other_node(path):
    for graph in graphs(path):
        for node in graph["nodes"]:
            if node["type"] in ("KVAEDecode", "KVAEDecodeToVideo", "KVAECompare"):
                grown = node | {"size": [node["size"][0], node["size"][1] + PICTURE]}
                for other in graph["nodes"]:
                    assert other is node or gap(grown, other) >= 0, f"{other['type']} {other['id']}"


@pytest.mark.parametrize("path", [p for p in PATHS if p.parent.name == "example_workflows"], ids=lambda path: path.stem)
def test_every_workflow_is_explained_in_three_languages(path):
    (note,) = (n for n in graphs(path)[0]["nodes"] if n.get("title") == "Read me · 说明 · Справка")
    (text,) = note["widgets_values"]
    parts = re.split(r"\*\*(中文|Русский)\*\*", text)
    assert parts[1::2] == ["中文", "Русский"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_two_widgets_of_a_subgraph_have_different_names(path):
    """A node that shows widgets of its subgraph shows their labels, else their names."""
    workflow, *subgraphs = graphs(path)
    inside = {graph["id"]: {str(node["id"]): node for node in graph["nodes"]} for graph in subgraphs}
    for node in workflow["nodes"]:
        shown = []
        for number, widget in node["properties"].get("proxyWidgets", ()):
            slots = {slot["name"]: slot for slot in inside[node["type"]][number]["inputs"]}
            shown.append(slots.get(widget, {}).get("label", widget))
        assert len(set(shown)) == len(shown), shown
        assert "value" not in shown


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_subgraph_shows_the_settings_of_load_kvae(path):
    """The frontend of 0.33.0 hides advanced settings of a subgraph's node, and its button only opens a side panel."""
    for node in graphs(path)[0]["nodes"]:
        shown = {widget for _, widget in node["properties"].get("proxyWidgets", ())}
        if {"latents", "decode_adapter", "memory_gb"} & shown:
            assert node["showAdvanced"] is True
