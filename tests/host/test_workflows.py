"""Workflows and blueprints are found, fit the server's schemas and are wired; those without downloads run."""

import importlib.util
import json
import re
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote

import pytest

import needs
from kvae_comfyui.adapters.published import PUBLISHED_FILES, published_address

from .conftest import HUNYUAN_15, T4S16

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
IN_THE_PAGE = {"MarkdownNote", "Note"}  # node types that exist only in the frontend
HUNYUAN = "HunyuanVideo / Kandinsky 5"
DECODER, ENCODER = PUBLISHED_FILES
OFFICIAL = {
    "HunyuanVideo text to video": "hunyuan_video_text_to_video",
    "Kandinsky 5 text to video": "video_kandinsky5_t2v",
    "Kandinsky 5 image to video": "video_kandinsky5_i2v",
    "HunyuanVideo 1.5 text to video": "video_hunyuan_video_1.5_720p_t2v",
    "HunyuanVideo 1.5 image to video": "video_hunyuan_video_1.5_720p_i2v",
}


def test_templates_and_their_thumbnails_are_served(server):
    """ComfyUI serves one folder of each pack under this address: the first that exists of `example_workflows`,
    `example`, `examples` and two more. In a checkout there is `examples`, too.
    """
    templates = server.get("/workflow_templates")
    assert sorted(templates["kvae"]) == [path.stem for path in WORKFLOWS]
    for path in (each for workflow in WORKFLOWS for each in (workflow, workflow.with_suffix(".jpg"))):
        assert server.content(f"/api/workflow_templates/kvae/{quote(path.name)}") == path.read_bytes()


def test_blueprints_are_found(server):
    try:
        found = server.get("/global_subgraphs")
    except HTTPError:
        pytest.skip("needs ComfyUI 0.3.67 or newer, which serves blueprints")
    ours = {key: entry["name"] for key, entry in found.items() if entry["info"]["node_pack"] == "custom_nodes.kvae"}
    assert sorted(ours.values()) == [path.stem for path in BLUEPRINTS]
    for key, name in ours.items():
        assert json.loads(server.get(f"/global_subgraphs/{key}")["data"]) == read(ROOT / "subgraphs" / f"{name}.json")


def test_the_first_workflow_needs_no_downloads():
    """Pages list templates by name, or as the file system does, which on Windows is by name, too."""
    first = WORKFLOWS[0]
    assert first == find("try it, no downloads")
    assert not [node for node in nodes_of(read(first)) if node["properties"].get("models")]


def test_every_node_is_in_some_workflow(ours):
    used = {node["type"] for path in WORKFLOWS for node in nodes_of(read(path))}
    assert used >= set(ours)


@pytest.mark.parametrize("path", WORKFLOWS + BLUEPRINTS, ids=lambda path: path.stem)
def test_a_workflow_fits_the_live_schemas(path, info):
    workflow = read(path)
    subgraphs = {graph["id"] for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    for node in nodes_of(workflow):
        if node["type"] in IN_THE_PAGE | subgraphs:
            continue
        if node["type"] not in info and not node["type"].startswith("KVAE"):
            pytest.skip(f"needs a ComfyUI with {node['type']}")
        schema = info[node["type"]]
        known = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        for slot in node["inputs"]:
            assert slot["name"] in known, f"{node['type']}.{slot['name']}"
            if slot["link"] is not None:
                assert known[slot["name"]][0] in (slot["type"], "*", "COMBO") or isinstance(
                    known[slot["name"]][0], list
                )
        found = [output["type"] for output in node["outputs"]]
        assert found == schema["output"][: len(found)], node["type"]  # newer versions add outputs at the end
        if node["type"].startswith("KVAE"):
            widgets = [key for key, spec in known.items() if is_widget(spec)]
            assert len(node["widgets_values"]) == len(widgets), node["type"]
            for key, value in zip(widgets, node["widgets_values"], strict=True):
                offered = options_of(known[key])
                assert offered is None or value in offered or is_file(value), f"{node['type']}.{key}: {value}"


@pytest.mark.parametrize("path", WORKFLOWS + BLUEPRINTS, ids=lambda path: path.stem)
def test_both_ends_of_every_link_agree(path):
    for graph in graphs_of(read(path)):
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        links = {link[0]: link[1:5] for link in map(as_list, graph["links"])}
        for number, (source, output, target, slot) in links.items():
            if source in nodes:  # else an end of the subgraph
                assert number in nodes[source]["outputs"][output]["links"]
            if target in nodes:
                assert nodes[target]["inputs"][slot]["link"] == number
        for node in graph["nodes"]:
            used = {slot["link"] for slot in node["inputs"]} | {
                n for out in node["outputs"] for n in out["links"] or ()
            }
            assert used - {None} <= links.keys()


@pytest.mark.parametrize("path", WORKFLOWS + BLUEPRINTS, ids=lambda path: path.stem)
def test_a_workflow_says_where_its_models_are(path):
    for node in nodes_of(read(path)):
        models = {model["name"]: model for model in node["properties"].get("models", ())}
        if node["type"] == "KVAELoadLatent":
            continue  # the note says where latents come from
        files = [v for v in node.get("widgets_values") or () if isinstance(v, str) and v.endswith(".safetensors")]
        automatic = PUBLISHED_FILES.keys() if node["type"] == "KVAELoad" else set()
        assert set(files) <= models.keys() <= set(files) | automatic, node["type"]
        for name, model in models.items():
            assert model["url"].startswith("https://") and model["directory"]
            if name in PUBLISHED_FILES:
                assert model == {"name": name, "url": published_address(name), "directory": "latent_adapters"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_load_kvae_names_the_adapters_that_auto_looks_for(path):
    for node in nodes_of(read(path)):
        if node["type"] == "KVAELoad" and node["widgets_values"][:2] == ["KVAE-3D-1.0.safetensors", HUNYUAN]:
            linked = {model["name"] for model in node["properties"]["models"]}
            assert DECODER in linked
            assert (ENCODER in linked) == ("image to video" in path.stem or "video to video" in path.stem)


@pytest.mark.parametrize("name", [name for name in OFFICIAL if "1.5" in name])
def test_hunyuan_video_1_5_has_the_kvae_of_its_grid(name):
    (loader,) = (node for node in nodes_of(read(find(name))) if node["type"] == "KVAELoad")
    assert loader["widgets_values"] == [T4S16, HUNYUAN_15, "auto", "auto", "auto", 0.0]


@pytest.mark.parametrize(("ours", "theirs"), OFFICIAL.items())
def test_a_generation_is_the_official_template_but_for_the_vae(ours, theirs):
    folder = importlib.util.find_spec("comfyui_workflow_templates_json")
    if folder is None or not folder.submodule_search_locations:
        pytest.skip(needs.TEMPLATES)
    template = Path(folder.submodule_search_locations[0]) / "templates" / f"{theirs}.json"
    if not template.is_file():
        pytest.skip(needs.TEMPLATES)
    for mine, official in zip(*(graphs_of(read(p)) for p in (find(ours), template)), strict=True):
        nodes = {node["id"]: node for node in mine["nodes"]}
        replaced = {node["id"] for node in official["nodes"] if node["type"].startswith("VAE")} - {
            number for number, node in nodes.items() if node["type"].startswith("VAE")
        }
        for node in official["nodes"]:
            if node["id"] not in replaced and "Note" not in node["type"]:
                same = nodes[node["id"]]
                assert (same["type"], same["mode"]) == (node["type"], node["mode"])
                assert same.get("widgets_values") == node.get("widgets_values")  # some nodes without widgets have none
        kept = {tuple(link) for link in map(as_list, official["links"]) if link[1] in nodes and link[3] in nodes}
        assert kept == {tuple(link) for link in map(as_list, mine["links"]) if link[1] in nodes and link[3] in nodes}
        assert {nodes[number]["type"] for number in replaced & nodes.keys()} <= {"KVAELoad", "KVAEDecode"}


def test_the_workflow_without_downloads_runs(server, info):
    workflow = read(find("try it, no downloads"))
    history = server.wait(server.start(to_api(workflow, info)))
    assert history["status"]["status_str"] == "success", history["status"]
    shown = [value for output in history["outputs"].values() for values in output.values() for value in values]
    names = [value["filename"] for value in shown if isinstance(value, dict)]
    assert sum(name.endswith(".png") for name in names) == 33
    assert sum(name.endswith(".mp4") for name in names) == 1
    assert sum(name.endswith(".latent") for name in names) == 1
    assert any("33 frames of 256 x 160 pixels" in value for value in shown if isinstance(value, str))


def test_the_workflow_of_hunyuan_video_1_5_without_downloads_runs(server, info):
    workflow = read(find("try HunyuanVideo 1.5, no downloads"))
    assert not [node for node in nodes_of(workflow) if node["properties"].get("models")]
    history = server.wait(server.start(to_api(workflow, info)))
    assert history["status"]["status_str"] == "success", history["status"]
    shown = [value for output in history["outputs"].values() for values in output.values() for value in values]
    assert sum(isinstance(value, dict) and value["filename"].endswith(".png") for value in shown) == 2 * 33
    texts = [value for value in shown if isinstance(value, str)]
    assert any("hunyuan_video_1.5" in text and "33 frames of 256 x 160 pixels" in text for text in texts)
    assert any("PSNR dB" in text for text in texts)


def test_the_blueprint_decodes(server, info):
    _, graph = graphs_of(read(ROOT / "subgraphs" / "Decode with KVAE.json"))
    prompt = to_api(graph, info)
    for node in prompt.values():
        if node["class_type"] == "KVAELoad":
            node["inputs"]["kvae_name"] = "tiny KVAE (included)"
    (source,) = {node["inputs"]["samples"][0] for node in prompt.values() if "samples" in node["inputs"]}
    size = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    prompt[source] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": size}
    (decoded,) = (key for key, node in prompt.items() if node["class_type"] == "KVAEDecode")
    prompt["show"] = {"class_type": "PreviewImage", "inputs": {"images": [decoded, 0]}}
    history = server.wait(server.start(prompt))
    assert history["status"]["status_str"] == "success", history["status"]
    assert len(history["outputs"]["show"]["images"]) == 5


def find(name: str) -> Path:
    """The file of one of our workflows, by its name without the number that sorts it."""
    (path,) = (path for path in WORKFLOWS if re.sub(r"^KVAE \d+ ", "", path.stem) == name)
    return path


def read(path: Path) -> dict:
    """A workflow or template."""
    return json.loads(path.read_text(encoding="utf-8"))


def graphs_of(workflow: dict) -> list[dict]:
    """A workflow and its subgraphs."""
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]


def nodes_of(workflow: dict) -> list[dict]:
    """The nodes of a workflow, those inside its subgraphs included."""
    return [node for graph in graphs_of(workflow) for node in graph["nodes"]]


def as_list(link: list | dict) -> list:
    """A link as [id, source node, output, target node, input, …]; subgraphs write it as a dict."""
    if isinstance(link, list):
        return link
    return [link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]


def options_of(spec: list) -> list | None:
    """Options of a combo; None for other widgets."""
    kind, *options = spec
    return kind if isinstance(kind, list) else options[0].get("options") if kind == "COMBO" else None


def is_file(value: object) -> bool:
    """Whether a value names a file, which need not exist."""
    return isinstance(value, str) and (".safetensors" in value or ".latent" in value)


def is_widget(spec: list) -> bool:
    """Whether an input of a schema is a widget of the node."""
    return isinstance(spec[0], list) or spec[0] in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")


def to_api(workflow: dict, info: dict) -> dict:
    """Convert a workflow, or the inside of a subgraph, to a prompt. Only without subgraphs in it and muted nodes."""
    sources = {link[0]: [str(link[1]), link[2]] for link in map(as_list, workflow["links"])}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in IN_THE_PAGE:
            continue
        parts = info[node["type"]]["input"]
        known = {**parts.get("required", {}), **parts.get("optional", {})}
        inputs = dict(
            zip((key for key, spec in known.items() if is_widget(spec)), node["widgets_values"], strict=False)
        )
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
