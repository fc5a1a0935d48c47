"""Planner: the memory that published models need, and the executions that it chooses."""

import pytest
import torch

from kvae_comfyui.kvae import KVAE, BudgetError, plan_decode
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.measured import WORKSPACE
from kvae_comfyui.serving.planning import Planner

Z, BF16 = (1, 16, 9, 90, 160), torch.bfloat16  # 33 frames of 1280x720


@pytest.fixture(scope="module")
def published():
    """KVAE-3D-1.0 in bfloat16, on the meta device."""
    with torch.device("meta"):
        return KVAE().to(BF16)


def test_memory_grows_with_the_picture_and_hardly_with_the_length(published):
    host = HostVAE(published)
    assert 15e9 < host.memory_used_decode(Z, BF16) < 25e9
    assert host.memory_used_decode((1, 16, 65, 90, 160), BF16) < 1.3 * host.memory_used_decode(Z, BF16)
    assert 10e9 < host.memory_used_encode((1, 3, 33, 720, 1280), BF16) < 15e9
    assert host.memory_used_decode(Z, torch.float32) == 2 * host.memory_used_decode(Z, BF16)


def test_the_fastest_execution_that_fits_is_used_or_the_smallest_if_none_fits(published):
    levels = []
    for free in (None, 12 << 30, 1):
        ladder = Planner(published, lambda free=free: free).ladder(plan_decode, Z, stream=True)
        levels.append(int(ladder.execution().recompute))
    assert levels == [0, 2, 3]


def test_what_the_caller_holds_is_not_free(published):
    fastest, held = plan_decode(published, Z), 1 << 30
    for free, fits in ((WORKSPACE * fastest.peak + held + 100, True), (WORKSPACE * fastest.peak + held - 100, False)):
        planner = Planner(published, lambda free=free: int(free))
        assert (planner.ladder(plan_decode, Z, held=held).plan == fastest) == fits
        assert planner.memory(plan_decode, Z, BF16, held=held) == WORKSPACE * fastest.peak + held


def test_a_budget_includes_the_workspace(published):
    peak = plan_decode(published, Z, stream=True).peak
    planner = Planner(published, budget=int(WORKSPACE * peak) + 1)
    assert planner.memory(plan_decode, Z, BF16, stream=True) == WORKSPACE * peak
    planner.budget = int(WORKSPACE * peak) - 1
    assert planner.memory(plan_decode, Z, BF16, stream=True) < WORKSPACE * peak
    planner.budget = 1
    with pytest.raises(BudgetError) as caught:
        planner.memory(plan_decode, Z, BF16, stream=True)
    planner.budget = caught.value.least.peak
    assert planner.memory(plan_decode, Z, BF16, stream=True) <= planner.budget


@pytest.mark.parametrize("budget", [None, 30 << 30])
def test_a_decode_is_planned_once(published, budget):
    """A host asks how many bytes a decode needs, frees them, and decodes."""
    planned = []

    def plan(*args, **options):
        planned.append(options)
        return plan_decode(*args, **options)

    planner = Planner(published, lambda: 30 << 30, budget)
    assert planner.memory(plan, Z, BF16) < 30 << 30
    assert planner.ladder(plan, Z).plan == plan_decode(published, Z)
    assert len(planned) == 1
    published_in_float32 = planner.kvae.float()
    assert planner.memory(plan, Z, torch.float32) > 0
    assert len(planned) == 2  # another dtype of the weights needs another plan
    published_in_float32.to(BF16)


def test_the_preferred_tile_fits_half_of_the_free_memory(published):
    host = HostVAE(published)
    sides = [host.preferred_decode_tile(gb * 1e9, BF16) for gb in (0.01, 8, 24)]
    assert sides[0] == 0 < sides[1] < sides[2]
    assert host.memory_used_decode((1, 16, 9, sides[2], sides[2]), BF16) <= 12e9
