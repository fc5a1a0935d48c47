"""Act at a given step of a training, from outside: PyTorch calls hooks after every step of an optimiser."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

ctrl_c = partial(signal.raise_signal, signal.SIGINT)


@contextmanager
def after_steps(call: Callable[[int, Optimizer], object], kind: type[Optimizer] = AdamW) -> Iterator[None]:
    """Within the context, call `call(steps so far, optimiser)` after every step of the training's optimiser of a kind.

    Every training uses one AdamW, except vfl-train, which uses Muon or AdamW alone.
    """
    steps = 0

    def count(optimiser: Optimizer, *_: object) -> None:
        nonlocal steps
        if isinstance(optimiser, kind):
            steps += 1
            call(steps, optimiser)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()


def at_step(step: int, action: Callable[[], object], kind: type[Optimizer] = AdamW):
    """A context in which `action` runs at the end of this step, counted from 1."""
    return after_steps(lambda steps, _: action() if steps == step else None, kind)
