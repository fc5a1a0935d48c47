"""If decoding, streaming or encoding runs out of memory, the failed try is freed before the next one."""

import os
import subprocess
import sys
import weakref

import pytest
import torch

import needs
from conftest import ROOT
from kvae_comfyui.kvae.engine.execution import present
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.memory import is_out_of_memory, with_less_memory

WAYS = {
    "decode": lambda host, z, x: host.decode(z),
    "decode_stream": lambda host, z, x: torch.cat(list(host.decode_stream(z)), dim=2),
    "encode": lambda host, z, x: host.encode(x),
}


class Card:
    """A model on a card that is too small for the first `failures` streams. A failed stream holds a real tensor."""

    def __init__(self, kvae, message, error=torch.OutOfMemoryError):
        self.held, self.alive, self.executions, self.failures = [], [], [], 1
        self.message, self.error = message, error
        for name in ("decode_stream", "encode_stream"):
            setattr(kvae, name, self.limited(getattr(kvae, name)))

    def limited(self, stream):
        def limited(x, execution, *rest, **options):
            self.executions.append(present(execution))
            self.alive.append([ref() is not None for ref in self.held])
            for i, part in enumerate(stream(x, execution, *rest, **options)):
                if i and len(self.executions) <= self.failures:
                    activations = torch.zeros(1000)
                    self.held.append(weakref.ref(activations))
                    raise self.error(self.message)
                yield part

        return limited


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        (MemoryError, ""),
    ],
)
def test_tensors_of_a_failed_try_are_freed_before_the_next(small_kvae, caplog, way, error, message):
    host, z, x = HostVAE(small_kvae), torch.randn(1, 16, 6, 8, 8), torch.rand(1, 3, 21, 64, 64)
    with torch.no_grad():
        whole = WAYS[way](host, z, x)
        card = Card(small_kvae, message, error)
        torch.testing.assert_close(WAYS[way](host, z, x), whole, rtol=0, atol=1e-4)
    assert card.alive == [[], [False]]
    (record,) = caplog.records
    assert record.getMessage().startswith("Out of memory; trying again with 16-frame segments, 16 MB strips")


@pytest.mark.parametrize("way", WAYS)
def test_the_last_error_is_the_same_on_every_device_and_holds_no_tensors(small_kvae, way):
    """Hosts catch it and decode in tiles, perhaps inside their own `except`."""
    host, z, x = HostVAE(small_kvae), torch.randn(1, 16, 6, 8, 8), torch.rand(1, 3, 21, 64, 64)
    card = Card(small_kvae, "DefaultCPUAllocator: can't allocate memory", RuntimeError)
    card.failures = 2
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"):
        WAYS[way](host, z, x)
    assert len(card.executions) == 2
    assert [ref() for ref in card.held] == [None, None]


def test_tiles_are_not_tried_again(small_kvae):
    host = HostVAE(small_kvae)
    card = Card(small_kvae, "not enough memory: you tried to allocate 8 bytes", RuntimeError)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="not enough memory"):
        host.encode_tiled(torch.rand(1, 3, 21, 32, 64), 32, 32, 8)
    assert len(card.executions) == 1  # the host decides what to do then
    assert [ref() for ref in card.held] == [None]


def test_other_errors_are_not_tried_again():
    tried = []

    def work():
        tried.append(1)
        yield torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match="must match the size"):
        list(with_less_memory(work, lambda: "less"))
    assert tried == [1]


def test_the_error_of_this_machines_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("could not create a primitive"))  # oneDNN, seen under a hard limit
    assert not is_out_of_memory(ValueError("out of memory"))


UNDER_A_LIMIT = """
import logging, resource, sys
import torch
from kvae_comfyui.kvae import KVAE, BudgetError, KVAEConfig, plan_decode, plan_encode
from kvae_comfyui.serving.host_vae import HostVAE

logging.basicConfig(level=logging.WARNING)
torch.manual_seed(0)
torch.set_num_threads(1)
kvae = KVAE(KVAEConfig((32, 64, 64, 64), (32, 64, 64, 64), num_res_blocks=1)).eval().requires_grad_(False).fold()
host, z, x = HostVAE(kvae), torch.randn(1, 16, 3, 20, 24), torch.rand(1, 3, 9, 160, 192)
plan, shape, work = {
    "decode": (plan_decode, z.shape, lambda: host.decode(z)),
    "decode_stream": (plan_decode, z.shape, lambda: [frames.mean() for frames in host.decode_stream(z)]),
    "encode": (plan_encode, x.shape, lambda: host.encode(x)),
}[sys.argv[1]]
host.decode(z[..., :8, :8]), host.encode(x[:, :, :5, :64, :64])  # loads code and kernels
most = plan(kvae, shape, None).peak
try:
    plan(kvae, shape, 0)
except BudgetError as error:
    least = error.least.peak
pages = int(open("/proc/self/statm").read().split()[0])
frames = x.nbytes if sys.argv[1] == "decode" else 0
limit = pages * resource.getpagesize() + 2 * frames + (most + least) // 2
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
work()
"""


@needs.linux
@pytest.mark.parametrize("way", WAYS)
def test_a_later_try_fits_a_hard_limit(way):
    """The limit is half-way between the most and the least: if a failed try were still held, the next would not fit."""
    # freed memory goes back to the system at once, so that the limit applies to the memory in use
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    env = os.environ | malloc | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", UNDER_A_LIMIT, way]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 <= done.stderr.count("Out of memory; trying again") <= 2
