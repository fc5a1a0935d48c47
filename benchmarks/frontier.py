"""The plans between which budgets choose."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from kvae_comfyui.kvae import KVAE, BudgetError, Plan


def frontier(plan: Callable[..., Plan], kvae: KVAE, shape: Sequence[int], step: float = 1, **way: Any) -> list[Plan]:
    """The plans that smaller and smaller budgets get, from the fastest to the one that needs least memory.

    Args:
        plan: `plan_decode` or `plan_encode`; `way` are its other arguments.
        step: each budget is this part of the peak of the plan before, less one byte. 1 finds every plan that some
            budget gets.
    """
    found = [plan(kvae, shape, **way)]
    with contextlib.suppress(BudgetError):
        while True:
            found.append(plan(kvae, shape, int(step * found[-1].peak) - 1, **way))
    return found
