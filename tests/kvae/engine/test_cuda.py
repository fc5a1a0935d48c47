"""On a GPU, float32 is as exact as on a CPU if cuDNN may not round it to TF32."""

import copy

import pytest
import torch

import needs
from kvae_comfyui.kvae import Execution, Recompute
from small_models import SMALL, assert_same, clip, latent, small

pytestmark = needs.gpu


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "execution", [Execution(), Execution(strip_bytes=1 << 14, recompute=Recompute.INNER)], ids=["whole", "by strips"]
)
def test_float32_without_tf32_equals_the_cpu(name, execution):
    kvae = small(name)
    x, z = clip(kvae, 21), latent(kvae, 6)
    on_gpu = copy.deepcopy(kvae).cuda()
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        assert_same(on_gpu.encode(x.cuda(), execution).cpu(), kvae.encode(x))
        assert_same(on_gpu.decode(z.cuda(), execution).cpu(), kvae.decode(z))
