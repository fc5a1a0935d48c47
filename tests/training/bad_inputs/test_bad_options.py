"""Options out of their range are refused in one line that names the option."""

from __future__ import annotations

import pytest

import needs
from bad_rows import (
    CPU,
    DEMO,
    EVALUATE,
    EXTRACT,
    OUT,
    PIXELS,
    RECONSTRUCT,
    TINY_COMMAND,
    TRAIN,
    Row,
    check,
    make_job,
)

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)

OPTIONS = [
    Row("frobnicate", "invalid choice"),
    Row("train", "required: --latent-root"),
    Row(TRAIN + " --no-such-option 3", "unrecognized arguments"),
    *(Row(f"{TRAIN} --lr {x}", "--lr is") for x in ("nan", "inf", "-1", "0")),
    Row(TRAIN + " --lr=-inf", "--lr is"),
    *(Row(f"{TRAIN} --weight-decay {x}", "--weight-decay is") for x in ("nan", "inf", "-1")),
    *(Row(f"{TRAIN} --ema {x}", "--ema is") for x in ("nan", "1", "-0.1", "inf")),
    *(Row(f"{TRAIN} --epochs {x}", "--epochs is") for x in ("0", "-1", str(2**80))),
    *(Row(f"{TRAIN} --batch-size {x}", "--batch-size is") for x in ("0", "-1", str(2**80))),
    *(Row(f"{TRAIN} --seed {x}", "--seed is") for x in ("-1", str(2**80))),
    Row(f"{TRAIN} --seed {'9' * 5000}", "is too large a number for any option"),
    *(Row(f"{TRAIN} --epochs {x}", "invalid int value") for x in ("1.5", "1e3", "''", "many")),
    Row(TRAIN + " --network other", "invalid choice"),
    Row("train --latent-root ''" + OUT + CPU, "--latent-root is empty"),
    *(Row(f"{command} --device {device}", "is not available on this machine")
      for command in (TRAIN, EXTRACT, EVALUATE, RECONSTRUCT) for device in ("meta", "moon", "cuda:99")),
    *(Row(f"{TRAIN} --device {device}", "is not available on this machine") for device in (
        *("xla", "mps", "hpu", "xpu", "mtia", "privateuseone", "vulkan", "ipu", "ve", "fpga", "maia", "lazy"),
        *("mkldnn", "opengl", "opencl", "ideep", "hip", "cpu:x", ":", "cuda:-1"),
    )),
    Row(TRAIN + " --device ''", "--device is empty"),
    *(Row(f"{EXTRACT} --height {x}", "--height is") for x in (str(2**40), str(2**20), "0", "-8", "50", "8")),
    *(Row(f"{EXTRACT} --width {x}", "--width is") for x in (str(2**40), "0")),
    *(Row(f"{EXTRACT} --num-frames {x}", "--num-frames is") for x in ("4", "0", "-3", str(2**40))),
    *(Row(f"{EXTRACT} --clips-per-video {x}", "--clips-per-video is") for x in ("0", "-1")),
    *(Row(f"{EXTRACT} --max-clips {x}", "--max-clips is") for x in ("-1", str(2**80))),
    *(Row(f"{EXTRACT} --batch-size {x}", "--batch-size is") for x in ("0", "-1")),
    *(Row(f"{EXTRACT} --seed {x}", "--seed is") for x in ("-1", str(2**80))),
    *(Row(f"{RECONSTRUCT} --height {x}", "") for x in ("0", "-8", "1048576", str(2**40), "50")),
    *(Row(f"{RECONSTRUCT} --num-frames {x}", "--num-frames is") for x in ("-3", "0", str(2**40))),
    Row(RECONSTRUCT + " --output {d}/r.avi", ".mp4"),
    *(Row(f"{PIXELS} --num-pixel-samples {x}", "--num-pixel-samples is") for x in ("0", "-1", str(2**80))),
    *(Row(f"{EVALUATE} --max-samples {x}", "--max-samples is") for x in ("0", "-1", str(2**80))),
    Row(EVALUATE + " --max-samples 1", "give --train-latent-root"),
    Row(EVALUATE + " --adapter-h2k ''", "--adapter-h2k is empty"),
    *(Row(f"{TINY_COMMAND} --stages {x}", "--stages") for x in (
        *("10x0x1", "1x32x999999999", "0x32x1", "1x32x0", "1x12x1", "1x256x1", "' '", "1x32", "1x32x1q", "-1x32x1"),
        *("1x32x1,,1x32x1", "٣x32x1", f"{'9' * 5000}x32x1", f"1x32x{'9' * 5000}"),
    )),
    *(Row(f"{TINY_COMMAND} --threads {x}", "--threads is") for x in ("-1", "1000000000")),
    *(Row(f"{TINY_COMMAND} --lr {x}", "--lr is") for x in ("nan", "0", "inf", "-1")),
    *(Row(f"{TINY_COMMAND} --seed {x}", "--seed is") for x in ("-1", str(2**80))),
    *(Row(f"{DEMO} --epochs {x}", "--epochs is") for x in ("0", "-1")),
    *(Row(f"{DEMO} --clips-per-video {x}", "--clips-per-video is") for x in ("0", "-1")),
]  # fmt: skip


@pytest.mark.parametrize("row", OPTIONS, ids=Row.name)
def test_an_option_out_of_its_range_is_an_error_of_one_line(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
