"""What a plan says a clip will hold is what it holds, and what does not fit is refused before it starts."""

import pytest
import torch

from kvae_comfyui.benchmarks.storages import PeakMemory
from kvae_comfyui.kvae import KVAE, BudgetError, KVAEConfig, plan_decode, plan_encode

WIDTHS = (32, 64, 128, 256)
MODELS = {
    "1.0": KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1),
    "2.0": KVAEConfig(WIDTHS, WIDTHS, num_res_blocks=1, norm="rms", downsample_version=2),
}


@pytest.fixture(params=MODELS)
def kvae(request):
    with torch.device("meta"):
        return KVAE(MODELS[request.param]).to(torch.bfloat16).requires_grad_(False).fold()


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_prediction_is_what_is_counted(kvae, direction):
    """On the meta device, where pictures cost no arithmetic: three segments of 240x424."""
    if direction == "decode":
        x, plan = torch.empty(1, 16, 11, 30, 53, dtype=torch.bfloat16, device="meta"), plan_decode
        stream = kvae.decode_stream
    else:
        x, plan = torch.empty(1, 3, 41, 240, 424, dtype=torch.bfloat16, device="meta"), plan_encode
        stream = kvae.encode_stream
    most = plan(kvae, x.shape, stream=True)
    with pytest.raises(BudgetError) as refused:
        plan(kvae, x.shape, budget=1000, stream=True)
    least = refused.value.least.peak
    assert most.peak > 1.4 * least
    methods = set()
    for budget in (most.peak, (most.peak + least) // 2, least):
        found = plan(kvae, x.shape, budget, stream=True)
        with PeakMemory() as memory:
            for _ in stream(x, found.method):
                pass
        assert memory.peak <= found.peak <= budget
        assert found.peak <= 1.15 * memory.peak
        methods.add(found.method)
    assert len(methods) == 3


def test_tiles_are_planned_too():
    """What a stream cannot do: the plan is for the clip as a whole, whose frames it does not count."""
    with torch.device("meta"):
        kvae = KVAE(MODELS["2.0"]).to(torch.bfloat16).requires_grad_(False).fold()
        z = torch.empty(1, 16, 11, 90, 80, dtype=torch.bfloat16)
    with pytest.raises(BudgetError) as refused:
        plan_decode(kvae, z.shape, budget=1000, stream=True)
    least = refused.value.least.peak
    found = plan_decode(kvae, z.shape, budget=least * 9 // 10)
    with PeakMemory() as memory:
        frames = kvae.decode(z, found.method)
    assert found.method.tiles != (1, 1)
    assert memory.peak - frames.nbytes <= found.peak <= least * 9 // 10


def test_a_plan_says_what_it_does(kvae):
    assert str(plan_decode(kvae, (1, 16, 5, 8, 8))).startswith("segments of 16 frames, strips of 256 MB: 0.0")
    with pytest.raises(BudgetError, match=r"the budget is 0.00 GB; the least memory this takes is \d+.\d\d GB"):
        plan_decode(kvae, (1, 16, 5, 90, 160), budget=1)
