"""The Triton kernel of `.fused_norm`, which imports this module only where it runs the kernel.

# B batch, C channels, T frames, H/W rows and columns, t/h/w latent frames, rows and columns
# x_BCTHW
"""

from __future__ import annotations

import triton
import triton.language as tl

# A program holds this many elements in registers. With half of them, more of its instructions would find addresses
# instead of computing values. Compiled for compute capability 9.0, a thread needs 52 to 71 registers, so 7 to 9
# programs run at a time on each multiprocessor. Not measured yet.
PROGRAM_ELEMENTS = 4096
WARPS = 4


# The numbers named here differ from strip to strip. Triton would otherwise compile the kernel again where one of them
# happens to be 1 or a multiple of 16. Strides are multiples of 16 in all published models. Triton must know that, to
# read 16 bytes at a time.
@triton.jit(
    do_not_specialize=[
        "frames", "rows", "columns", "out_rows", "out_columns", "top", "left",
        "frame_bits", "row_bits", "column_bits", "skipped_frames", "skipped_rows",
    ]
)  # fmt: skip
def normalise(
    x_at, y_at, scale_at, shift_at,
    x_b, x_t, x_h, x_w, y_b, y_t, y_h, y_w, z_b, z_t, z_h, z_w,  # strides in elements; that of channels is 1
    frames, rows, columns, out_rows, out_columns, top, left,
    frame_bits, row_bits, column_bits, skipped_frames, skipped_rows,
    C: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    RMS: tl.constexpr, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Compute POSITIONS neighbours in one frame of y, row after row, with all of their channels.

    CHANNELS is C, rounded up to a power of two. `.fused_norm` explains the other arguments.
    """
    b, t = tl.program_id(1) // frames, tl.program_id(1) % frames
    position = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    out_row, out_column = position // out_columns, position % out_columns
    row = tl.minimum(tl.maximum(out_row - top, 0), rows - 1)
    column = tl.minimum(tl.maximum(out_column - left, 0), columns - 1)
    z_frame = (t + skipped_frames) >> frame_bits
    z_row, z_column = (row + skipped_rows) >> row_bits, column >> column_bits
    c = tl.arange(0, CHANNELS)[None, :]
    is_channel = c < C
    # a map may have 4e9 elements; within a frame, `.fused_norm` ensures offsets below 2 ** 31
    x_at += b.to(tl.int64) * x_b + t.to(tl.int64) * x_t
    y_at += b.to(tl.int64) * y_b + t.to(tl.int64) * y_t
    z_at = b.to(tl.int64) * z_b + z_frame.to(tl.int64) * z_t
    x_offset = (row * x_h + column * x_w)[:, None] + c
    y_offset = (out_row * y_h + out_column * y_w)[:, None] + c
    z_offset = (z_row * z_h + z_column * z_w)[:, None] + c

    x = tl.load(x_at + x_offset, mask=is_channel, other=0.0).to(tl.float32)
    if RMS:
        x *= (1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12))[:, None]
    x *= tl.load(scale_at + z_at + z_offset, mask=is_channel, other=0.0).to(tl.float32)
    if SHIFT:
        x += tl.load(shift_at + z_at + z_offset, mask=is_channel, other=0.0).to(tl.float32)
    x /= 1.0 + tl.exp2(x * -1.4426950408889634)  # SiLU, by 2 ** (-x log2 e): `exp` would take a third more instructions
    if ZEROS:
        inside = (row == out_row - top) & (column == out_column - left)
        x = tl.where(inside[:, None], x, 0.0)
    tl.store(y_at + y_offset, x, mask=is_channel & (position < out_rows * out_columns)[:, None])
