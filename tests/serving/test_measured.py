"""What a card takes is learned from first segments: it corrects later plans, and the rest of the running clip."""

import threading
from dataclasses import replace

import pytest
import torch

import needs
from kvae_comfyui.kvae import FAMILY, KVAE, plan_decode, plan_encode
from kvae_comfyui.serving import measured
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.measured import LEAST_BYTES, MARGIN, WORKSPACE, CudaMeter, Ratios, meter_of
from kvae_comfyui.serving.planning import Planner

HD, BF16, GB = (1, 16, 9, 90, 160), torch.bfloat16, 1 << 30


class FakeMeter:
    """Says that `growth` bytes were taken."""

    def __init__(self):
        self.taken, self.started = 0, 0

    def start(self):
        self.started += 1

    def growth(self):
        return self.taken


@pytest.fixture
def meter():
    return FakeMeter()


@pytest.fixture
def ratios(meter):
    return Ratios(lambda device: meter)


@pytest.fixture
def case(small_kvae):
    return torch.device("cpu"), torch.float32, small_kvae.config, plan_decode


def learn(ratios, meter, case, ratio, counted=GB):
    meter.taken = int(ratio * counted)
    with ratios.measured(case, counted):
        pass


def test_a_ratio_rises_at_once_and_falls_by_half(ratios, meter, case):
    assert ratios.of(case) == WORKSPACE
    for measured_ratio, expected in ((1.25, 1.25), (1.75, 1.75), (1.25, 1.5), (1.5, 1.5)):
        learn(ratios, meter, case, measured_ratio)
        assert ratios.of(case) == pytest.approx(MARGIN * expected)


def test_a_cautious_plan_does_not_make_the_next_one_bold(ratios, meter, case):
    learn(ratios, meter, case, 0.5)
    assert ratios.of(case) == MARGIN


def test_device_dtype_model_and_direction_have_ratios_of_their_own(ratios, meter, case, small_kvae):
    device, dtype, config, plan = case
    learn(ratios, meter, case, 1.5)
    others = (
        (torch.device("meta"), dtype, config, plan),
        (device, BF16, config, plan),
        (device, dtype, replace(config, num_res_blocks=2), plan),
        (device, dtype, config, plan_encode),
    )
    assert [ratios.of(other) for other in others] == [WORKSPACE] * 4


def test_tiny_clips_failures_and_absurd_ratios_teach_nothing(ratios, meter, case):
    learn(ratios, meter, case, 2, counted=LEAST_BYTES - 1)
    assert meter.started == 0
    learn(ratios, meter, case, 3.1)
    with pytest.raises(torch.OutOfMemoryError), ratios.measured(case, GB):
        raise torch.OutOfMemoryError
    assert ratios.of(case) == WORKSPACE
    learn(ratios, meter, case, 1.5)  # the failure did not block it
    assert ratios.of(case) == pytest.approx(MARGIN * 1.5)


def test_one_thread_measures_at_a_time(ratios, meter, case):
    """The other would count what this one takes."""
    meter.taken = 2 * GB
    with ratios.measured(case, GB):
        other = threading.Thread(target=learn, args=(ratios, meter, case, 2.5))
        other.start()
        other.join()
        meter.taken = int(1.5 * GB)
    assert meter.started == 1
    assert ratios.of(case) == pytest.approx(MARGIN * 1.5)


def test_nothing_is_measured_on_a_cpu():
    assert meter_of(torch.device("cpu")) is None
    assert isinstance(meter_of(torch.device("cuda")), CudaMeter)


# ---- what follows from it


@pytest.fixture
def published():
    """KVAE-3D-1.0 in bfloat16, on the meta device."""
    with torch.device("meta"):
        return KVAE().to(BF16)


def one_segment(ladder):
    """Let the ladder watch a clip of two segments."""
    assert list(ladder.watch(iter("ab"))) == ["a", "b"]


def test_the_next_plan_takes_what_was_learned_into_account(published, ratios, meter):
    fastest = plan_decode(published, HD)
    free = int(1.3 * fastest.peak)
    planner = Planner(published, lambda: free, ratios=ratios)
    ladder = planner.ladder(plan_decode, HD)
    assert ladder.plan == fastest
    meter.taken = int(1.6 * fastest.first)
    one_segment(ladder)
    assert planner.memory(plan_decode, HD, BF16) == pytest.approx(1.6 * MARGIN * fastest.peak)
    again = planner.ladder(plan_decode, HD).plan
    assert again == plan_decode(published, HD, int(free / (1.6 * MARGIN))) != fastest


@pytest.mark.parametrize("name", ["1.0", "2.0-t4s8"])
def test_the_rest_of_a_clip_is_computed_in_less_if_the_first_segment_took_too_much(name, meter, caplog):
    """In segments of the same length and without tiles, since the clip is half done."""
    caplog.set_level("INFO")
    with torch.device("meta"):
        kvae = KVAE(FAMILY[name]).to(BF16)
    fastest = plan_decode(kvae, HD, stream=True)
    meter.taken = int(1.25 * fastest.first)
    for share, stays in ((1.2, False), (1.4, True)):
        free = int(share * fastest.peak)
        ladder = Planner(kvae, lambda free=free: free, ratios=Ratios(lambda device: meter)).ladder(plan_decode, HD)
        assert ladder.plan == fastest
        executions = [ladder.execution() for _ in ladder.watch(iter("ab"))]  # the engine asks before the second segment
        assert executions == [ladder.plan.execution] * 2
        assert (ladder.plan == fastest) == stays
        assert 1.25 * MARGIN * ladder.plan.peak <= free
        assert (ladder.plan.execution.segment, ladder.plan.execution.tiles) == (16, (1, 1))
    assert len([r for r in caplog.records if "More memory is taken than was counted" in r.getMessage()]) == 1


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_a_change_in_the_middle_of_a_clip_does_not_change_the_result(small_kvae, meter, monkeypatch, caplog, way):
    monkeypatch.setattr(measured, "LEAST_BYTES", 0)
    caplog.set_level("INFO")
    host = HostVAE(small_kvae)
    x, plan = torch.randn(1, 16, 6, 8, 8), plan_decode
    if way == "encode":
        x, plan = torch.rand(1, 3, 21, 64, 64), plan_encode
    fastest = plan(small_kvae, x.shape)
    with torch.no_grad():
        expected = getattr(host, way)(x)
        assert not caplog.records
        host.planner.ratios = Ratios(lambda device: meter)
        held = 2 * x.nbytes if way == "encode" else 0
        host.planner.free_memory = lambda: int(WORKSPACE * fastest.peak) + held + 100
        meter.taken = int(1.2 * fastest.first)
        torch.testing.assert_close(getattr(host, way)(x), expected, rtol=0, atol=1e-4)
    (record,) = caplog.records
    assert "More memory is taken than was counted" in record.getMessage()
    assert meter.started == 1


def test_tiles_are_not_measured(published, ratios, meter):
    tiles = Planner(published, ratios=ratios).tiles(plan_decode, HD, (32, 32), 8, side=1)
    one_segment(tiles)
    ladder = Planner(published, lambda: 2 << 30, approximate=True, ratios=ratios).ladder(plan_decode, HD)
    assert ladder.plan.execution.overlap
    one_segment(ladder)
    assert meter.started == 0


@needs.gpu
def test_the_counters_of_a_card_follow_what_is_allocated_since_the_start():
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    meter = CudaMeter(device)
    meter.start()
    during = torch.empty(32 << 20, dtype=torch.uint8, device=device)
    del before, during
    assert 32 << 20 <= meter.growth() < 33 << 20
