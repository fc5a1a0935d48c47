"""Draw samples of a data set in worker processes, for test_sampling_law, started in two processes.

    draw_samples.py index|stream ROOT COUNT WORKERS

It prints, for each sample, the worker and the id, identity and secondary's size that it gave, as JSON.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from itertools import chain, islice

from torch.utils.data import DataLoader, Dataset, get_worker_info

from kvae_comfyui.training.vfl.index import Index
from kvae_comfyui.training.vfl.shards import manifest_path, read_manifest, shard_files
from kvae_comfyui.training.vfl.stream import Stream, streamed

SEED, P_SECONDARY = 42, 0.1


def by_worker(data: bytes) -> tuple[int, int]:
    """In the place of decoding a picture: which worker read it, and its size."""
    info = get_worker_info()
    return (info.id if info else 0), len(data)


class OfRun(Dataset):
    """The samples of a run that fall to this process: every second one of two processes."""

    def __init__(self, root: str, rank: int, processes: int, count: int):
        self.index, self.rank, self.processes, self.count = Index(root, "train"), rank, processes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        return self.index.sample(SEED, i * self.processes + self.rank, P_SECONDARY, by_worker)


if __name__ == "__main__":
    kind, root, count, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if kind == "index":
        data = OfRun(root, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), count)
        batches = DataLoader(data, batch_size=20, num_workers=workers, collate_fn=list)
        samples = chain.from_iterable(batches)
    else:
        urls = [path.as_uri() for path in shard_files(Path(root), "train")]
        manifest = read_manifest(manifest_path(Path(root), "train"))
        samples = streamed(Stream(urls, manifest, SEED, 0, P_SECONDARY, by_worker), workers)
    for each in islice(samples, count):
        other = each.secondary[1] if each.secondary else 0
        print(json.dumps([each.picture[0], each.id, each.identity, other]))
