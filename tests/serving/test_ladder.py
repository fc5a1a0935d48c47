"""When memory runs out, each next plan needs clearly less, nothing of the failed try is left, and no frame is lost."""

import logging
from collections import deque
from functools import partial
from itertools import pairwise

import pytest
import torch

from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import KVAE, BudgetError, KVAEConfig, plan_decode, plan_encode
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.ladder import STEP
from kvae_comfyui.serving.measured import WORKSPACE
from kvae_comfyui.serving.planning import Planner

Z, X = (1, 16, 6, 8, 8), (1, 3, 21, 64, 64)  # two plans
HD = 1, 16, 9, 90, 160  # 33 frames of 1280x720


class SmallCard(PeakMemory):
    """Memory with a limit in bytes: an operator whose result does not fit fails, as on a GPU."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit

    def _follow(self, storage):
        super()._follow(storage)
        if self.now > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.now} of {self.limit} bytes")


def decoded(host, z, out):
    host.decode(z, output_buffer=out)


def streamed(host, z, out):
    done = 0
    for frames in host.decode_stream(z):
        out[:, :, done : done + frames.shape[2]] = frames
        done += frames.shape[2]
    assert done == out.shape[2]


def encoded(host, x, out):
    out.copy_(host.encode(x))


WAYS = {"decode": (decoded, plan_decode, Z), "stream": (streamed, plan_decode, Z), "encode": (encoded, plan_encode, X)}


def rungs(ladder):
    """All plans of a ladder, from the first down."""
    plans = [ladder.plan]
    while plan := ladder.step_down():
        plans.append(plan)
    return plans


def retries(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture(scope="module")
def published():
    """KVAE-3D-1.0 in bfloat16, on the meta device."""
    with torch.device("meta"):
        return KVAE().to(torch.bfloat16)


def test_every_rung_needs_at_most_0_7_of_the_one_above_and_the_last_exact_one_least(published):
    plans = rungs(Planner(published).ladder(plan_decode, HD))
    assert plans[0] == plan_decode(published, HD)
    for above, plan in pairwise(plans[:-1]):
        assert plan == plan_decode(published, HD, int(STEP * above.peak))
    with pytest.raises(BudgetError) as refused:
        plan_decode(published, HD, 0)
    assert plans[-1] == refused.value.least
    assert len(plans) > 2


def test_blended_tiles_are_below_all_exact_rungs_and_never_in_streams(published):
    exact = rungs(Planner(published).ladder(plan_decode, HD))
    plans = rungs(Planner(published, approximate=True).ladder(plan_decode, HD))
    assert plans[: len(exact)] == exact
    assert len(plans) > len(exact)
    assert all(plan.execution.overlap for plan in plans[len(exact) :])
    assert rungs(Planner(published, approximate=True).ladder(plan_decode, HD, stream=True)) == exact


def test_blended_tiles_are_chosen_at_once_if_nothing_exact_fits(published):
    free = 4 << 30
    first = Planner(published, lambda: free, approximate=True).ladder(plan_decode, HD).plan
    assert first == plan_decode(published, HD, int(free / WORKSPACE), approximate=True)
    assert first.execution.overlap


def test_there_are_rungs_below_a_budget(published):
    budget = 12 << 30
    first, *below = rungs(Planner(published, budget=budget).ladder(plan_decode, HD))
    assert WORKSPACE * first.peak <= budget
    assert below and below[0].peak <= STEP * first.peak
    with pytest.raises(BudgetError):
        Planner(published, budget=1).ladder(plan_decode, HD)


@pytest.mark.parametrize("way", WAYS)
def test_a_smaller_plan_gives_the_same_result_and_the_failed_try_is_freed_before_it(small_kvae, caplog, way):
    run, plan, shape = WAYS[way]
    host, source, held = HostVAE(small_kvae.fold()), torch.rand(shape), []
    _, least = rungs(host.planner.ladder(plan, shape, stream=way == "stream"))
    with torch.no_grad():
        whole = torch.empty(host.decode_output_shape(Z) if plan is plan_decode else Z)
        out = torch.empty_like(whole)
        run(host, source, whole)
        with SmallCard(least.peak + source.nbytes * (plan is plan_encode)) as card:
            host.planner.make_room = lambda: held.append(card.now)
            run(host, source, out)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-4)
    assert retries(caplog) == [f"Out of memory; trying again with {least}"]
    assert held == [0]
    assert card.now == 0


@pytest.mark.parametrize(("way", "approximate"), [("decode", True), ("stream", False)])
def test_every_limit_leads_to_a_rung_that_fits(caplog, way, approximate):
    """On the meta device, which does no arithmetic. Blended tiles come last."""
    widths = 32, 64, 128, 256
    with torch.device("meta"):
        kvae = KVAE(KVAEConfig(widths, widths, num_res_blocks=1)).to(torch.bfloat16).requires_grad_(False).fold()
        z = torch.empty(1, 16, 6, 20, 36, dtype=torch.bfloat16)
    host = HostVAE(kvae)
    host.latents_checked, host.output_device, host.planner.approximate = True, z.device, approximate
    x = torch.empty(host.decode_output_shape(z.shape), device="meta")
    plans = rungs(host.planner.ladder(plan_decode, z.shape, stream=way == "stream"))[: 3 + approximate]
    assert [plan.execution.overlap is not None for plan in plans] == [False] * 3 + [True] * approximate
    frames = 2 * x.nbytes * 17 // x.shape[2]  # of a segment, in float32; plans count them in bfloat16
    for i, plan in enumerate(plans):
        caplog.clear()
        held: list[int] = []
        with torch.no_grad(), SmallCard(plan.peak + frames) as card:
            host.planner.make_room = partial(lambda held, card: held.append(card.now), held, card)
            WAYS[way][0](host, z, x)
        assert retries(caplog) == [f"Out of memory; trying again with {each}" for each in plans[1 : len(held) + 1]]
        assert len(held) <= i and set(held) <= {0}
        assert STEP * plan.peak < plans[len(held)].peak <= plan.peak + frames
        assert card.now == 0


@pytest.mark.parametrize("way", WAYS)
def test_below_the_least_plan_the_error_is_that_of_a_gpu_and_nothing_is_left(small_kvae, way):
    run, plan, shape = WAYS[way]
    host, source = HostVAE(small_kvae.fold()), torch.rand(shape)
    _, least = rungs(host.planner.ladder(plan, shape))
    out = torch.empty(host.decode_output_shape(Z) if plan is plan_decode else Z)
    with torch.no_grad(), SmallCard(0.8 * least.peak) as card:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            run(host, source, out)
        assert card.now == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_later_clip_begins_on_the_rung_that_worked_and_memory_is_asked_for_once(small_kvae, caplog, way):
    run, plan, shape = WAYS[way]
    asked = []
    host, source = HostVAE(small_kvae.fold()), torch.rand(2, *shape[1:])
    host.planner.free_memory = lambda: asked.append(None) or 1 << 40
    out = torch.empty(2, *(host.decode_output_shape(Z) if plan is plan_decode else Z)[1:])
    plans = rungs(host.planner.ladder(plan, shape, stream=way == "stream"))
    asked.clear()
    with torch.no_grad(), SmallCard(plans[1].peak + source.nbytes):
        if way == "stream":
            deque(host.decode_stream(source), maxlen=0)
        else:
            run(host, source, out)
    assert retries(caplog) == [f"Out of memory; trying again with {plans[1]}"]
    assert len(asked) == 1


def test_no_frame_is_sent_twice_and_progress_never_goes_back(small_kvae, caplog):
    """Memory runs out in the second segment of the second clip."""
    host, z, seen = HostVAE(small_kvae.fold()), torch.randn(2, *Z[1:]), []
    frames, card = [], SmallCard(float("inf"))
    host.on_progress = lambda done, total: seen.append((done, total))
    host.planner.make_room = lambda: setattr(card, "limit", float("inf"))
    with torch.no_grad():
        whole = host.decode(z)
        seen.clear()
        with card:
            for segment in host.decode_stream(z):
                frames.append(segment)
                card.limit = 1.1 * card.now if len(frames) == 3 else float("inf")
    assert [segment.shape[2] for segment in frames] == [17, 4, 17, 4]
    torch.testing.assert_close(torch.cat(frames[2:], dim=2), whole[1:], rtol=0, atol=1e-4)
    assert seen == [(0, 12), (5, 12), (6, 12), (11, 12), (12, 12)]
    assert len(retries(caplog)) == 1
