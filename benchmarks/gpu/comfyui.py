"""VAE Decode in a real ComfyUI (COMFYUI_PATH): KVAE beside the stock VAE of HunyuanVideo, with little memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvae_comfyui.benchmarks.comfy_server import Server
from kvae_comfyui.benchmarks.gpu.holder import Holder
from kvae_comfyui.benchmarks.gpu.ladder import exact, gigabytes_text, note, shown
from kvae_comfyui.benchmarks.gpu.limited import TILES, TRIED, WARM, Decode
from kvae_comfyui.benchmarks.gpu.measure import Share, free
from kvae_comfyui.benchmarks.gpu.models import random_hunyuan, random_kvae, source_of
from kvae_comfyui.benchmarks.gpu.setup import Setup, shape_text
from kvae_comfyui.benchmarks.peak import ROOT
from kvae_comfyui.benchmarks.tables import paragraph
from kvae_comfyui.kvae.load import save_kvae

FALLBACK = "Ran out of memory when regular VAE decoding"  # ComfyUI says so before it decodes in tiles
UNLOAD_SECONDS = 2
LOADERS = {
    "told": {
        "class_type": "KVAELoad",
        "inputs": {
            "kvae_name": "KVAE.safetensors",
            "latents": "KVAE (native)",
            "decode_adapter": "auto",
            "encode_adapter": "auto",
            "dtype": "auto",
            "memory_gb": 0.0,
        },
    },
    "HunyuanVideo": {"class_type": "VAELoader", "inputs": {"vae_name": "hunyuan.safetensors"}},
}


def section(setup: Setup) -> Iterator[str]:
    """A row for each limit, if there is a ComfyUI."""
    if "COMFYUI_PATH" not in os.environ:
        return
    yield f"## VAE Decode in ComfyUI, {shape_text(setup.ladder_size)}"
    yield ""
    yield from paragraph(
        "Seconds of the prompt, by GB that another process leaves free: KVAE-3D-1.0 and the stock VAE of HunyuanVideo, "
        "with random weights. The weights are in the CPU's memory when the prompt starts. After a time: as above."
    )
    yield ""
    yield "| GB | KVAE | exact | HunyuanVideo |"
    yield "|---|---|---|---|"
    found = {(decode.free, decode.way): decode for decode in decodes(setup)}
    for gigabytes in setup.free:
        kvae, stock = (found.get((gigabytes, way)) for way in LOADERS)
        cells = [gigabytes_text(gigabytes), shown(kvae), exact(kvae), shown(stock)]
        yield f"| {' | '.join(cells)} |"
    note(setup, found, "ComfyUI")


def decodes(setup: Setup) -> Iterator[Decode]:
    """KVAE, then the stock VAE, for each limit that begins within the section's time."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_files(setup, base)
        free(setup.device)
        holder = None if setup.tiny else stack.enter_context(Holder())
        comfyui = Path(os.environ["COMFYUI_PATH"]).resolve()
        server = stack.enter_context(Server(comfyui, base, "--cpu" if setup.tiny else ""))
        share = Share(setup.shares["comfyui"])
        ways = [way for way in LOADERS if way == "told" or not setup.tiny]  # ComfyUI knows one size of HunyuanVideo's
        for way in ways:
            decode(server, way, None, "warm")
        for gigabytes in setup.free:
            for way in ways:
                if share.is_over:
                    return
                server.post("/free", {"unload_models": True})
                time.sleep(UNLOAD_SECONDS)
                if holder and gigabytes:
                    holder.leave(int(1e9 * gigabytes))
                yield decode(server, way, gigabytes, f"{gigabytes}")


def write_files(setup: Setup, base: Path) -> None:
    """A base directory of ComfyUI with this pack, both VAEs, and a latent for each limit, so that none is cached."""
    for folder in ("custom_nodes", "input", "output", "user", "models/vae"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "kvae").symlink_to(ROOT)
    kvae = random_kvae(setup.family["1.0"], setup.device, setup.dtype)
    save_kvae(base / "models/vae/KVAE.safetensors", kvae, setup.dtype, {})
    hunyuan = random_hunyuan(setup, setup.dtype).state_dict()  # ComfyUI reads the keys of diffusers too
    save_file(
        {key: weight.cpu().contiguous() for key, weight in hunyuan.items()}, base / "models/vae/hunyuan.safetensors"
    )
    z = source_of(kvae.config, "decode", setup.ladder_size, torch.device("cpu"), torch.float32)
    latents = {"warm": z[..., :WARM, :WARM]} | {f"{gigabytes}": z + i for i, gigabytes in enumerate(setup.free)}
    for name, latent in latents.items():
        tensors = {"latent_tensor": latent.contiguous(), "latent_format_version_0": torch.tensor([])}
        save_file(tensors, base / "input" / f"{name}.latent")


def decode(server: Server, way: str, gigabytes: float | None, latent: str) -> Decode:
    """Run a prompt that decodes a latent and saves its first frame."""
    prompt = {
        "vae": LOADERS[way],
        "latent": {"class_type": "LoadLatent", "inputs": {"latent": f"{latent}.latent"}},
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": ["vae", 0]}},
        "frame": {"class_type": "ImageFromBatch", "inputs": {"image": ["decode", 0], "batch_index": 0, "length": 1}},
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["frame", 0]}},
    }
    before = len(server.log_text())
    history = server.wait(server.start(prompt))
    lines = server.log_text()[before:].splitlines()
    tried = [line.split(TRIED)[1] for line in lines if TRIED in line]
    tried += [TILES for line in lines if FALLBACK in line]
    return Decode(way, gigabytes, seconds_of(history), tried)


def seconds_of(history: dict) -> float | None:
    """Seconds of a prompt; None if it ran out of memory.

    Raises:
        RuntimeError: it failed for another reason.
    """
    messages = dict(history["status"]["messages"])
    if "execution_success" in messages:
        return (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000
    error = messages["execution_error"]
    if "OutOfMemory" in error["exception_type"] or "out of memory" in error["exception_message"]:
        return None
    raise RuntimeError(error["exception_message"])
