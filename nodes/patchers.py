"""The KVAEs in memory, each inside the patcher with which ComfyUI moves it between devices.

A KVAE lives as long as a VAE with it does, mostly in ComfyUI's cache of results: what empties that cache, such as *Free
model and node cache*, frees the KVAE. Before ComfyUI runs a loader with a new budget or adapter it drops the loader's
old VAE; the loader's fingerprint, which it takes before that, therefore holds the KVAE while the prompt runs.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from weakref import WeakValueDictionary

import torch
from comfy.model_patcher import ModelPatcher

from ..kvae import load_kvae
from .vae import patcher_of

Stamp = tuple[str, float, int]  # path, time and size of a file

_in_memory: WeakValueDictionary[tuple[Stamp, torch.dtype], ModelPatcher] = WeakValueDictionary()
_held: ContextVar[tuple[ModelPatcher | None, ...]] = ContextVar("_held", default=())


def load_patcher(stamp: Stamp, dtype: torch.dtype) -> ModelPatcher:
    """Load the KVAE of a file, unless it is in memory.

    Raises:
        WeightsError: the file is not a KVAE.
    """
    patcher = _in_memory.get((stamp, dtype))
    if patcher is None:
        patcher = _in_memory[stamp, dtype] = _read(stamp, dtype)
        patcher.cached_patcher_init = _read, (stamp, dtype)  # how Select VAE Device gets a KVAE for another card
    return patcher


def hold(stamp: Stamp, dtype: torch.dtype) -> None:
    """Keep the KVAE of a file, if it is in memory, until ComfyUI has run the prompt: each has a context of its own."""
    _held.set((*_held.get(), _in_memory.get((stamp, dtype))))


def _read(stamp: Stamp, dtype: torch.dtype) -> ModelPatcher:
    path, *_ = stamp
    kvae = load_kvae(path, dtype)
    logging.info("Loaded KVAE from %s in %s", path, str(dtype).removeprefix("torch."))
    return patcher_of(kvae)
