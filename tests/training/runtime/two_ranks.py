"""Run by test_processes in several processes: trains, and writes each process' weights beside the adapters.

Each draws other random numbers, as processes on machines that are not alike may: they are to train as one all the same.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from kvae_comfyui.training.adapters import train
from kvae_comfyui.training.cli import main

RANK = int(os.environ["RANK"])
draw, train_on = torch.manual_seed, train._train


def and_write(state, job):
    train_on(state, job)
    torch.save(state.tensors(), job.folder / f"rank{RANK}.pt")


torch.manual_seed = lambda seed: draw(seed + RANK)
train._train = and_write
sys.exit(main(sys.argv[1:]))
