"""A training for test_processes, started in two processes. Each writes its last weights next to the adapters.

Each process draws different random numbers, as processes on different machines may. They must still train as one.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from kvae_comfyui.training.cli import main

RANK = int(os.environ["RANK"])
draw = torch.manual_seed
last: dict[Optimizer, list[torch.Tensor]] = {}  # weights after the last step, by optimiser in order


def keep(optimiser: Optimizer, *_: object) -> None:
    last[optimiser] = [p.detach().clone() for group in optimiser.param_groups for p in group["params"]]


torch.manual_seed = lambda seed: draw(seed + RANK)
register_optimizer_step_post_hook(keep)
code = main(sys.argv[1:])
weights = [tensor for each in last.values() for tensor in each]
torch.save(weights, Path(sys.argv[sys.argv.index("--out-h2k") + 1]).parent / f"rank{RANK}.pt")
sys.exit(code)
