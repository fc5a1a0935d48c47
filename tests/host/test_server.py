"""The pack in a real server: it imports, all inputs and outputs are explained, errors are shown, Cancel works."""

import json
import os
import re
import time

import av
import pytest
import torch

import needs
from kvae_comfyui.benchmarks.comfy_server import Server
from kvae_comfyui.serving.latent_writers import save_latent

from .page import Page
from .test_workflows import find, read, to_api


def test_the_pack_imports_in_silence(server, ours):
    assert len(ours) == 11
    log = server.log_text()
    assert not re.search(r"(IMPORT FAILED|Cannot import).*custom_nodes", log)
    for problem in ("Error while calling comfy_entrypoint", "No VAE weights"):
        assert problem not in log


def test_every_node_input_and_output_is_explained(ours):
    for name, node in ours.items():
        assert name.startswith("KVAE")
        assert node["description"], name
        for part in ("required", "optional"):
            for key, (_, *options) in node["input"].get(part, {}).items():
                assert options and options[0].get("tooltip"), f"{name}.{key}"
        assert all(node["output_tooltips"]) and len(node["output_tooltips"]) == len(node["output"]), name


def test_every_node_is_beside_its_like_of_comfyui(info, ours):
    beside = {"KVAELoad": "VAELoader", "KVAELoadAdapter": "VAELoader"}
    beside |= {"KVAEDecodeToVideo": "CreateVideo", "KVAESampleClip": "CreateVideo"}
    for name, node in ours.items():
        assert node["category"] == info[beside.get(name, "VAEDecode")]["category"] + "/KVAE", name


def test_every_node_is_found_by_other_words(ours, declared):
    for name, node in ours.items():
        words = node.get("search_aliases") or []
        assert len(words) > 3 if "search_aliases" in declared else not words, name
        assert all(word == word.lower() for word in words) and len(words) == len(set(words)), name


def test_settings_that_few_need_are_advanced(ours, declared):
    few = {
        "KVAELoad": {"latents", "decode_adapter", "encode_adapter", "dtype", "memory_gb"},
        "KVAEDecode": {"scaling", "memory_gb", "approximate"},
        "KVAEDecodeToVideo": {"scaling", "memory_gb", "codec", "crf"},
    }
    for name, node in ours.items():
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        found = {key for key, (_, *options) in inputs.items() if options and options[0].get("advanced")}
        assert found >= few.get(name, set()) if "advanced: bool" in declared else not found, name


@pytest.fixture(scope="session")
def declared(comfyui_path):
    """Where this ComfyUI declares what schemas and inputs may have."""
    return (comfyui_path / "comfy_api" / "latest" / "_io.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("language", ["zh", "ru"])
def test_every_text_is_translated(server, ours, language):
    texts = server.get("/i18n")[language]["nodeDefs"]
    assert set(ours) == {name for name in texts if name.startswith("KVAE")}
    for name, node in ours.items():
        assert texts[name]["display_name"] and texts[name]["description"]
        inputs = {key for part in ("required", "optional") for key in node["input"].get(part, {})}
        assert texts[name]["inputs"].keys() == inputs
        assert texts[name]["outputs"].keys() == {str(i) for i in range(len(node["output"]))}
        for slot in (*texts[name]["inputs"].values(), *texts[name]["outputs"].values()):
            assert slot["name"] and slot["tooltip"]


def test_every_node_has_a_help_page(server, ours):
    for name in ours:
        page = server.content(f"/extensions/kvae/docs/{name}.md").decode()
        assert page.splitlines()[0] == f"# {ours[name]['display_name']}"
        (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
        assert server.content(f"/extensions/kvae/docs/{picture}").startswith(b"\xff\xd8")  # a JPEG
        for language in ("zh", "ru"):
            assert server.content(f"/extensions/kvae/docs/{name}/{language}.md").decode().startswith("# ")


@pytest.mark.parametrize(("file", "node"), [("decode_to_video", "KVAEDecodeToVideo"), ("load_kvae", "KVAELoad")])
def test_the_page_gets_the_scripts_that_two_nodes_need(server, file, node):
    scripts = [path for path in server.get("/extensions") if path.startswith("/extensions/kvae/")]
    assert len(scripts) == 2
    assert f'"{node}"' in server.content(f"/extensions/kvae/{file}.js").decode()


def test_a_change_of_adapter_does_not_reload_the_file_of_the_kvae(server, base):
    folder = base / "models" / "latent_adapters"
    prompt = {
        "1": {"class_type": "KVAELoad", "inputs": LOAD | {"decode_adapter": "h2k.safetensors", "dtype": "fp32"}},
        "2": {"class_type": "EmptyHunyuanLatentVideo", "inputs": EMPTY | {"length": 1}},
        "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }
    loads = []
    try:
        (folder / "other.safetensors").write_bytes((folder / "h2k.safetensors").read_bytes())
        for name in ("h2k", "other"):
            prompt["1"]["inputs"]["decode_adapter"] = f"{name}.safetensors"
            history = server.wait(server.start(prompt))
            assert history["status"]["status_str"] == "success", history["status"]
            ran = [data["nodes"] for kind, data in history["status"]["messages"] if kind == "execution_cached"]
            assert "1" not in ran[0]  # Load KVAE ran in both prompts
            loads.append(server.log_text().count("Loaded KVAE from"))
    finally:
        (folder / "other.safetensors").unlink(missing_ok=True)
    assert loads[0] == loads[1]


def test_no_prompt_reads_a_latent_outside_comfyuis_folders(server, base, tmp_path):
    """The server refuses outside files in the same words, whether or not they exist."""
    path = tmp_path / "x.latent"
    save_latent(path, torch.zeros(1, 16, 1, 4, 4), None, None, {})
    inside = base / "input" / "inside.latent"
    inside.write_bytes(path.read_bytes())
    up = os.path.relpath(path, base / "input")
    said = []
    for name in (str(path), up, f"{up} [output]", str(tmp_path / "absent.latent"), "../server.log"):
        answer = server.post("/prompt", {"prompt": load_and_inspect(name)})
        (error,) = answer["node_errors"]["1"]["errors"]
        said.append(f"{error['message']} {error['details']}".replace(name, "NAME"))
    assert len(set(said)) == 1 and "no such latent file" in said[0]
    history = server.wait(server.start(load_and_inspect(inside.name)))
    assert history["status"]["status_str"] == "success", history["status"]
    inside.unlink()


def load_and_inspect(file: str) -> dict:
    """A prompt that loads a latent file and inspects it."""
    return {
        "1": {"class_type": "KVAELoadLatent", "inputs": {"file": file, "scaling": "auto"}},
        "2": {"class_type": "KVAEInspectLatent", "inputs": {"samples": ["1", 0]}},
    }


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


def decode_to_video(server: Server, length: int, prefix: str, **inputs) -> dict:
    """A prompt that decodes an empty latent into a video, with sound where ComfyUI has a node for it (≥ 0.3.77)."""
    settings = {"scaling": "raw", "memory_gb": 0.0, "fps": 25.0, "codec": "h264", "crf": 30, "filename_prefix": prefix}
    links = {"samples": ["2", 0], "vae": ["1", 0]}
    prompt = {
        "1": {"class_type": "KVAELoad", "inputs": LOAD},
        "2": {"class_type": "EmptyHunyuanLatentVideo", "inputs": EMPTY | {"length": length}},
        "4": {"class_type": "KVAEDecodeToVideo", "inputs": settings | links | inputs},
    }
    if server.get("/object_info/EmptyAudio"):
        audio = {"duration": 300.0, "sample_rate": 44100, "channels": 2}
        prompt["3"] = {"class_type": "EmptyAudio", "inputs": audio}
        prompt["4"]["inputs"]["audio"] = ["3", 0]
    return prompt


@pytest.mark.parametrize("keep", [False, True])
def test_cancel_leaves_what_is_finished_as_a_video_if_it_is_to_be_kept(server, base, keep):
    prompt = decode_to_video(server, 4001, f"stopped {keep}/t", keep_unfinished=keep)
    page = Page(server, prompt, cancel_when=lambda page: len(page.pictures) == 3 and page.texts)
    assert "execution_interrupted" in page.kinds
    files = list((base / "output" / f"stopped {keep}").iterdir())
    assert [path.name for path in files] == ["t_00001_.mp4"] * keep
    for path in files:
        with av.open(str(path)) as video:
            frames = len(list(video.decode(video=0)))
        assert 33 < frames < 4001 and frames % 16 == 1
        if "3" in prompt:
            with av.open(str(path)) as video:
                heard = sum(frame.samples for frame in video.decode(audio=0)) / 44100
            assert heard == pytest.approx(frames / 25, abs=0.05)


def test_the_page_shows_a_picture_of_each_segment_and_the_time_left(server):
    page = Page(server, decode_to_video(server, 4001, "shown/t"), cancel_when=lambda page: len(page.texts) == 2)
    assert len(page.pictures) > 2 and {node for node, _ in page.pictures} == {"4"}
    assert all(max(picture.size) >= 64 and picture.format == "JPEG" for _, picture in page.pictures)
    assert [value for node, value, most in page.bar if node == "4"][:3] == [0, 5, 9]
    for node, text in page.texts:
        assert node == "4" and re.fullmatch(r"\d+ %, about (\d+ s|\d+ min|\d+ h( \d+ min)?) left", text), text


@pytest.mark.parametrize("node", ["VAEDecode", "KVAEDecode"])
def test_the_page_shows_the_picture_of_a_short_decode_without_a_word(server, node):
    prompt = decode_to_video(server, 37, "")
    settings = {"scaling": "raw", "memory_gb": 0.0, "approximate": False} if node == "KVAEDecode" else {}
    prompt["4"] = {"class_type": node, "inputs": {"samples": ["2", 0], "vae": ["1", 0]} | settings}
    prompt["5"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    page = Page(server, prompt)
    assert [shown for shown, _ in page.pictures] == ["4"] * 3
    assert page.texts == []


def test_run_pressed_again_does_not_decode_again(server, base):
    """The page then sends an input that the node does not have, so that ComfyUI runs the node again."""
    prompt = decode_to_video(server, 21, "run again/t")
    first = Page(server, prompt)
    prompt["4"]["inputs"]["video-preview"] = ""
    again = Page(server, prompt)
    assert [node for node, *_ in first.bar if node == "4"] and not again.bar
    assert again.executed["4"]["images"] == first.executed["4"]["images"]
    assert [path.name for path in (base / "output" / "run again").iterdir()] == ["t_00001_.mp4"]


def test_a_batch_is_a_list_of_videos(server, base):
    prompt = decode_to_video(server, 5, "batch of two/t")
    prompt["2"]["inputs"]["batch_size"] = 2
    prompt["5"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["4", 0]}}
    prompt["6"] = {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}}
    page = Page(server, prompt)
    assert page.history["status"]["status_str"] == "success", page.history["status"]
    assert [each["filename"] for each in page.executed["4"]["images"]] == ["t_00001_.mp4", "t_00002_.mp4"]
    assert len(page.executed["6"]["images"]) == 10


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
    wrong = {"class_type": "KVAELoad", "inputs": LOAD | {"kvae_name": "hunyuan.safetensors"}}
    assert "a HunyuanVideo VAE" in error({"1": wrong, "2": picture, "3": decode, "4": show})


@needs.gpu
@pytest.mark.parametrize("device", ["--lowvram", "--novram", "--highvram"])
def test_on_a_gpu_no_weight_is_left_on_the_wrong_device(comfyui_path, base, info, device):
    workflow = read(find("try it, no downloads"))
    with Server(comfyui_path, base, device) as server:
        history = server.wait(server.start(to_api(workflow, info)))
    assert history["status"]["status_str"] == "success", history["status"]


LOAD = {
    "kvae_name": "KVAE.safetensors",
    "latents": "HunyuanVideo / Kandinsky 5",
    "decode_adapter": "auto",
    "encode_adapter": "auto",
    "dtype": "auto",
    "memory_gb": 0.0,
}
EMPTY = {"width": 64, "height": 64, "batch_size": 1}
