"""The precisions that KVAE runs in, by the names that options and nodes give them."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
