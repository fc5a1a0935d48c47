"""`python -m training` for test_vfl_pack, with shards of about five small pictures: a run writes many, slowly."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from kvae_comfyui.training.cli import main
from kvae_comfyui.training.vfl import pack

write = pack.write_shard


def write_slowly(*args: object) -> None:
    time.sleep(0.05)
    write(*args)


pack.SHARD_BYTES, pack.write_shard = 700, write_slowly
sys.exit(main(sys.argv[1:]))
