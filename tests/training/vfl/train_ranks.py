"""Trainings one after the other, for test_vfl_train, in processes that start once: commands are joined by --."""

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from kvae_comfyui.training import cli
from kvae_comfyui.training.runtime.processes import leave

for between, argv in groupby(sys.argv[1:], "--".__eq__):
    if not between and (code := cli._run(list(argv))):
        sys.exit(code)
leave()
