"""The pack in a real server: it imports, its schemas say all, its workflows fit and run, Cancel works."""

import json
import time
from pathlib import Path

import pytest

from .server import Server

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NO_DOWNLOADS = "KVAE - try it with no downloads"
IN_THE_PAGE = {"MarkdownNote", "Note"}  # node types that only the page knows


@pytest.fixture(scope="module")
def server(comfyui_path, base):
    with Server(comfyui_path, base) as server:
        yield server


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def ours(info):
    return {name: node for name, node in info.items() if node["python_module"].startswith("custom_nodes.kvae")}


def test_the_pack_imports_in_silence(server, ours):
    assert len(ours) == 11
    log = server.log_text()
    for problem in ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint", "No VAE weights"):
        assert problem not in log


def test_every_node_input_and_output_is_explained(ours):
    for name, node in ours.items():
        assert name.startswith("KVAE")
        assert node["description"], name
        assert node["category"] == "KVAE"
        for part in ("required", "optional"):
            for key, (_, *options) in node["input"].get(part, {}).items():
                assert options and options[0].get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"]) and len(node["output_tooltips"]) == len(node["output"]), name


@pytest.mark.parametrize("language", ["zh", "ru"])
def test_every_text_is_translated(server, ours, language):
    texts = server.get("/i18n")[language]["nodeDefs"]
    for name, node in ours.items():
        assert texts[name]["display_name"] and texts[name]["description"]
        inputs = {key for part in ("required", "optional") for key in node["input"].get(part, {})}
        assert texts[name]["inputs"].keys() == inputs
        assert texts[name]["outputs"].keys() == {str(i) for i in range(len(node["output"]))}
        for slot in (*texts[name]["inputs"].values(), *texts[name]["outputs"].values()):
            assert slot["name"] and slot["tooltip"]


def test_every_node_has_a_help_page(server, ours):
    for name in ours:
        assert server.text(f"/extensions/kvae/docs/{name}.md").startswith("# ")


def test_templates_are_found(server):
    templates = server.get("/workflow_templates")
    assert sorted(templates["kvae"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert path.with_suffix(".jpg").is_file()


def test_every_node_is_in_some_workflow(ours):
    used = {node["type"] for path in WORKFLOWS for node in nodes_of(json.loads(path.read_text(encoding="utf-8")))}
    assert used >= set(ours)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_fits_the_live_schemas(path, info):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    subgraphs = {graph["id"] for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    for node in nodes_of(workflow):
        if node["type"] in IN_THE_PAGE | subgraphs:
            continue
        assert node["type"] in info, node["type"]
        schema = info[node["type"]]
        known = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        for slot in node["inputs"]:
            assert slot["name"] in known, f"{node['type']}.{slot['name']}"
            if slot["link"] is not None:
                assert known[slot["name"]][0] in (slot["type"], "*", "COMBO") or isinstance(
                    known[slot["name"]][0], list
                )
        assert [output["type"] for output in node["outputs"]] == schema["output"], node["type"]
        if node["type"].startswith("KVAE"):
            widgets = [key for key, spec in known.items() if is_widget(spec)]
            assert len(node["widgets_values"]) == len(widgets), node["type"]


def test_the_workflow_without_downloads_runs(server, info):
    workflow = json.loads((ROOT / "workflows" / f"{NO_DOWNLOADS}.json").read_text(encoding="utf-8"))
    history = server.wait(server.start(to_api(workflow, info)))
    assert history["status"]["status_str"] == "success", history["status"]
    shown = [value for output in history["outputs"].values() for values in output.values() for value in values]
    names = [value["filename"] for value in shown if isinstance(value, dict)]
    assert sum(name.endswith(".png") for name in names) == 33
    assert sum(name.endswith(".mp4") for name in names) == 1
    assert sum(name.endswith(".latent") for name in names) == 1
    assert any("33 frames of 256 x 160 pixels" in value for value in shown if isinstance(value, str))


def test_cancel_stops_a_stock_decode(server):
    prompt = {
        "1": {"class_type": "KVAELoad", "inputs": LOAD},
        "2": {"class_type": "EmptyHunyuanLatentVideo", "inputs": EMPTY | {"length": 2001}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }
    prompt_id = server.start(prompt)
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.1)
    time.sleep(3)
    asked = time.monotonic()
    server.post("/interrupt", {})
    history = server.wait(prompt_id)
    assert time.monotonic() - asked < 10  # a segment takes a second or two here, the whole clip minutes
    kinds = [kind for kind, _ in history["status"]["messages"]]
    assert "execution_interrupted" in kinds


def test_errors_reach_the_user(server):
    def error(prompt: dict) -> str:
        answer = server.post("/prompt", {"prompt": prompt})
        if answer.get("node_errors"):
            return json.dumps(answer["node_errors"])
        history = server.wait(answer["prompt_id"])
        return json.dumps([data for kind, data in history["status"]["messages"] if kind == "execution_error"])

    load = {"class_type": "KVAELoad", "inputs": LOAD}
    show = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    decode = {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}}
    picture = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    message = error({"1": load, "2": picture, "3": decode, "4": show})
    assert "This is an image latent, [1, 4, 8, 8]" in message
    absent = {"class_type": "KVAELoad", "inputs": LOAD | {"kvae_name": "KVAE-3D-1.0.safetensors"}}
    message = error({"1": absent, "2": picture, "3": decode, "4": show})
    assert "kandinskylab/KVAE-3D-1.0" in message
    assert "tiny KVAE (included)" in message
    wrong = {"class_type": "KVAELoad", "inputs": LOAD | {"kvae_name": "hunyuan.safetensors"}}
    assert "a HunyuanVideo VAE" in error({"1": wrong, "2": picture, "3": decode, "4": show})


LOAD = {
    "kvae_name": "KVAE.safetensors",
    "latents": "HunyuanVideo / Kandinsky 5",
    "decode_adapter": "auto",
    "encode_adapter": "auto",
    "dtype": "auto",
}
EMPTY = {"width": 64, "height": 64, "batch_size": 1}


def nodes_of(workflow: dict) -> list[dict]:
    """The nodes of a workflow, those inside its subgraphs included."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    return workflow["nodes"] + [node for graph in subgraphs for node in graph["nodes"]]


def is_widget(spec: list) -> bool:
    """Whether an input of a schema is set in the node itself."""
    return isinstance(spec[0], list) or spec[0] in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")


def to_api(workflow: dict, info: dict) -> dict:
    """A workflow of the page → a prompt, for flat workflows with no muted nodes."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
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
