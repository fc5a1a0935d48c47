"""vfl-head for test_vfl_head, started in two processes, of which the second draws other random numbers."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from kvae_comfyui.training.cli import main

draw = torch.manual_seed
torch.manual_seed = lambda seed: draw(seed + int(os.environ["RANK"]))
sys.exit(main(sys.argv[1:]))
