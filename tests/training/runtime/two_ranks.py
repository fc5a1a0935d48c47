"""Run by test_processes in several processes: trains, and writes each process' weights next to the adapters.

Each process draws other random numbers, as processes on machines that are not alike may. They must train as one all
the same.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from at_step import after_steps
from kvae_comfyui.training.cli import main

RANK = int(os.environ["RANK"])
draw = torch.manual_seed
optimisers = set()
torch.manual_seed = lambda seed: draw(seed + RANK)
with after_steps(lambda _, optimiser: optimisers.add(optimiser)):
    code = main(sys.argv[1:])
weights = [p.detach() for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
torch.save(weights, Path(sys.argv[sys.argv.index("--out-h2k") + 1]).parent / f"rank{RANK}.pt")
sys.exit(code)
