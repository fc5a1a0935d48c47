"""A process that holds a card's memory, as another program would.

python -m benchmarks.gpu.holder      # reads numbers of bytes to leave free, one a line, and answers each with a line
"""

from __future__ import annotations

import subprocess
import sys
from types import TracebackType

import torch

from kvae_comfyui.benchmarks.peak import ROOT


class Holder:
    """The process, as a context manager."""

    def __enter__(self) -> Holder:
        command = [sys.executable, "-m", "benchmarks.gpu.holder"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def leave(self, free: int) -> None:
        """Hold everything but `free` bytes of what is free now without the holder."""
        assert self.process.stdin and self.process.stdout
        print(free, file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            raise RuntimeError("the process that holds the card's memory has ended")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin
        self.process.stdin.close()  # the process ends at the end of its input
        self.process.wait()


def main() -> None:
    """Hold what each line asks for, in place of what the line before asked for."""
    held: list[torch.Tensor] = []
    for line in sys.stdin:
        held.clear()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        held.append(torch.empty(max(0, free - int(line)), dtype=torch.uint8, device="cuda"))
        print(held[0].nbytes, flush=True)


if __name__ == "__main__":
    main()
