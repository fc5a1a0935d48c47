"""The KVAE stays in memory while ComfyUI's cache keeps a VAE with it, and no longer: the buttons for it are obeyed.

Whether it was in memory is seen in the log, which names every read of a file.
"""

import pytest

from kvae_comfyui.benchmarks.comfy_server import Server

from .test_server import LOAD


def prompt(budget: float = 0.0, **changes) -> dict:
    """Two loaders, bf16 beside fp32, and a picture from each."""
    nodes = {"latent": {"class_type": "EmptyHunyuanLatentVideo", "inputs": SMALL}}
    for dtype in ("fp32", "bf16"):
        load = LOAD | {"dtype": dtype, "memory_gb": budget} | changes
        decode = {"samples": ["latent", 0], "vae": [f"load {dtype}", 0]}
        nodes[f"load {dtype}"] = {"class_type": "KVAELoad", "inputs": load}
        nodes[f"decode {dtype}"] = {"class_type": "VAEDecode", "inputs": decode}
        nodes[f"show {dtype}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"decode {dtype}", 0]}}
    return nodes


SMALL = {"width": 64, "height": 64, "length": 1, "batch_size": 1}


def reads(server: Server, nodes: dict) -> int:
    """How many files of KVAEs a prompt reads."""
    before = server.log_text().count("Loaded KVAE from")
    history = server.wait(server.start(nodes))
    assert history["status"]["status_str"] == "success", history["status"]
    return server.log_text().count("Loaded KVAE from") - before


def reads_after(server: Server, nodes: dict, **button: bool) -> int:
    """How many files are read after a button of ComfyUI was pressed.

    The server obeys between two prompts, at the latest after the next one: so the prompt is run twice.
    """
    server.post("/free", button)
    return reads(server, nodes) + reads(server, nodes)


@pytest.fixture(scope="module")
def classic(comfyui_path, base):
    """A server that drops a result when its inputs change, and that asks VAEs to run in float16."""
    with Server(comfyui_path, base, "--cpu --cache-classic --fp16-vae") as server:
        yield server


@pytest.mark.parametrize("cache", ["server", "classic"])
def test_a_kvae_is_read_once_until_comfyui_frees_its_cache(request, cache):
    server = request.getfixturevalue(cache)
    reads_after(server, prompt(), unload_models=True, free_memory=True)  # other tests may have left a KVAE
    assert [reads(server, prompt(budget)) for budget in (1.0, 2.0, 2.0)] == [0, 0, 0]
    assert reads(server, prompt(2.0, decode_adapter="h2k.safetensors")) == 0
    assert reads_after(server, prompt(3.0), unload_models=True) == 0  # the card's memory, not the cache
    assert reads_after(server, prompt(3.0), unload_models=True, free_memory=True) == 2


def test_without_a_cache_each_run_reads_the_files(comfyui_path, base):
    with Server(comfyui_path, base, "--cpu --cache-none") as server:
        assert [reads(server, prompt()) for _ in range(2)] == [2, 2]


def test_float16_is_never_used_and_the_log_says_once_what_is_used_instead(classic):
    for budget in (7.0, 8.0):
        reads(classic, prompt(budget, dtype="auto"))
    log = classic.log_text()
    assert log.count("KVAE is not made for float16 (--fp16-vae); it runs in float32") == 1
    assert "KVAE.safetensors in float16" not in log
