"""What a training of a Video-Free LoRA will hold in memory, counted from configs before anything is loaded.

    found = plan(transformer_config, Sizes(frames=17, height=480, width=848), vae_config, dinov3_config)
    print(found.table())
    found.check(free_bytes("cuda"))

The product's own functions run on tensors without data, and the bytes of all tensors that are alive are added up.
Workspaces of convolutions and fragments of the allocator come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch

from ..errors import UserError
from .count import matmul_rate
from .draws import Draws
from .path import Steps
from .placement import BASE_DTYPES
from .plan_parts import count_look, count_network, latent_size
from .quiet import quiet

GIB = 2**30
VISITING = 2  # blocks on the device at once where they are offloaded or in parts: the one that runs, and the next
AGAIN = 3  # a pass with gradients: forward, once more for the checkpoints, and back to the inputs
# What can be lowered, the cheapest first: the option as it is said, and the change
LOWER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--decode-scale 0.5", {"decode_scale": 0.5}),
    ("--base-dtype fp8", {"base_dtype": "fp8"}),
    ("--offload", {"offload": True}),
    ("--decode-latents 2", {"decode_latents": 2}),
    ("--frames 9", {"frames": 9}),
)


@dataclass(frozen=True)
class Sizes:
    """The settings of a training that decide its memory, by the names of its options.

    Attributes:
        frames, height, width: of a clip, in pixels; the largest size that the pictures need.
        base_dtype: how the base is stored: "bf16", "fp8" or "fp32".
        offload: whether the blocks wait in host memory.
        targets, rank: of the LoRA.
        momenta: tensors that the optimiser keeps for each weight: 1 for Muon, 2 for AdamW.
        decode_latents, decode_scale: see `decoders.smaller`.
        identity_frames: frames of a clip that the identity loss looks at; 0 without it.
        appearance: whether there is the appearance loss.
        processes: among which the base is sharded; 1 keeps it whole.
        text_tokens: of the longest prompt, in both encoders.
    """

    frames: int = 17
    height: int = 480
    width: int = 848
    base_dtype: str = "bf16"
    offload: bool = False
    targets: str = "published"
    rank: int = 16
    momenta: int = 1
    decode_latents: int = 0
    decode_scale: float = 0.5
    identity_frames: int = 5
    appearance: bool = False
    processes: int = 1
    text_tokens: int = 256


@dataclass(frozen=True)
class Passes:
    """How often the network runs in an optimiser's step, on average.

    Attributes:
        teacher: without gradients.
        student: with gradients: one forward, one again for the checkpoints, and the backward.
    """

    teacher: float
    student: float


def passes(
    law: Steps, steps: int, band: tuple[int, int], every: int = 1, guided: bool = False, samples: int = 1
) -> Passes:
    """The passes of one process, averaged over a thousand draws of the law.

    Args:
        law, steps, band: as `Steps.draw` takes them.
        every: of these optimiser steps, one has an identity loss; 0 for none.
        guided: whether the teacher's path follows guidance, which takes a second pass.
        samples: of one optimiser step, in one process.
    """
    drawn = [law.draw(Draws(0, "steps", k), steps, band, bool(every) and k % every == 0) for k in range(1000)]
    looks = 1 / every if every else 0  # the identity loss first runs the student without gradients
    teacher = mean(each.indices[-1] + 1 for each in drawn) * (2 if guided else 1) + looks
    return Passes(samples * teacher, samples * mean(len(each.indices) for each in drawn))


@dataclass(frozen=True)
class Plan:
    """The memory of one process, in bytes, and the work of one optimiser step.

    Attributes:
        held: what is there all the time, by name.
        student: what the network's pass with gradients adds at its peak.
        decode: what the identity loss with gradients adds at its peak; never together with the student's.
        host: bytes of host memory that the offloaded blocks take.
        operations: floating-point operations of the network in a step; 0 if no passes were given.
        tokens, width: rows and columns of the network's matrix products.
        changed: the plan with some of its sizes changed.
    """

    sizes: Sizes
    held: Mapping[str, int]
    student: int
    decode: int
    host: int
    operations: float
    tokens: int
    width: int
    changed: Callable[[dict[str, Any]], Plan]

    @property
    def total_bytes(self) -> int:
        """What is held all the time, and the larger of the two peaks."""
        return sum(self.held.values()) + max(self.student, self.decode)

    def table(self, device: str | torch.device = "cpu") -> str:
        """The parts in GiB, one a line, their sum, and the least time of a step.

        Args:
            device: on a GPU, the time is reckoned from the operations and a matrix product that is timed there.
        """
        rows = [
            *self.held.items(),
            ("a pass of the network with gradients, at its peak", self.student),
            ("the identity loss with gradients, at its peak, at another moment", self.decode),
            ("at once, at the most", self.total_bytes),
        ]
        lines = [f"{size / GIB:8.2f} GiB  {name}" for name, size in rows if size]
        if self.host:
            lines.append(f"{self.host / GIB:8.2f} GiB  of host memory, for the blocks")
        lines.append("Counted on shapes, not measured; workspaces of the device come on top.")
        return "\n".join(lines + ([self._work(torch.device(device))] if self.operations else []))

    def _work(self, device: torch.device) -> str:
        """The operations of a step and, on a GPU, the time that they take at least."""
        said = f"The network takes {self.operations / 1e12:,.0f} TFLOP a step"
        if device.type != "cuda":
            return f"{said} (counted)."
        rate = matmul_rate(device, self.tokens, self.width)
        return (
            f"{said}: {self.operations / rate:,.1f} s at least, at the {rate / 1e12:,.0f} TFLOP/s of a matrix product "
            "on this device. The step itself was not measured; decoding and copying come on top."
        )

    def check(self, free_bytes: int) -> None:
        """Refuse a training that does not fit.

        Raises:
            UserError: one line: what is needed, what is free, and the options that make it fit, the cheapest first.
        """
        if self.total_bytes <= free_bytes:
            return
        said, least = [], self
        whole = self.sizes.processes == 1  # a base in parts is neither narrow nor offloaded
        for flag, change in LOWER:
            if not whole and change.keys() & {"base_dtype", "offload"}:
                continue
            smaller = least.changed(change)
            if smaller.total_bytes < least.total_bytes:
                said.append(f"{flag} ({(least.total_bytes - smaller.total_bytes) / GIB:.1f} less)")
                least = smaller
            if least.total_bytes <= free_bytes:
                break
        lower, left = ", ".join(said), least.total_bytes
        advice = f"it fits with {lower}" if left <= free_bytes else f"{lower or 'as it is'}: {left / GIB:.1f}, at least"
        parts = {**self.held, "a pass with gradients": self.student, "the identity loss": self.decode}
        name = max(parts, key=lambda part: parts[part])
        raise UserError(
            f"this training holds {self.total_bytes / GIB:.1f} GiB at once, {free_bytes / GIB:.1f} are free; {name} "
            f"takes {parts[name] / GIB:.1f}; {advice}"
        )


def plan(
    transformer: Mapping[str, Any],
    sizes: Sizes,
    decoder: Any = None,
    backbone: Any = None,
    work: Passes | None = None,
) -> Plan:
    """Count a training. It takes seconds, no memory, and no weights.

    Args:
        transformer: the config of diffusers' HunyuanVideo15Transformer3DModel, as `load_config` gives it.
        decoder: the config of AutoencoderKLHunyuanVideo15, or a KVAE's KVAEConfig; None without an identity loss.
        backbone: the config of DINOv3ViTModel, as a mapping, needed with a decoder.
        work: passes of a step, for its operations.
    """
    z = latent_size(sizes.frames, sizes.height, sizes.width)
    shape = sizes.frames, sizes.height, sizes.width
    with quiet():
        network = count_network(transformer, *shape, sizes.base_dtype, sizes.targets, sizes.rank, sizes.text_tokens)
        dtype = BASE_DTYPES[sizes.base_dtype]
        part = (z, sizes.decode_latents, sizes.decode_scale, sizes.identity_frames, sizes.appearance)
        look = None if decoder is None else count_look(decoder, backbone or {}, dtype, *part)
    all_blocks = network.blocks * network.block
    here = all_blocks
    if sizes.offload or sizes.processes > 1:
        here = VISITING * network.block + (0 if sizes.offload else all_blocks // sizes.processes)
    held = {
        f"the base in {sizes.base_dtype}{' (offloaded)' * sizes.offload}{' (shared)' * (sizes.processes > 1)}": (
            network.rest + here
        ),
        "the LoRA, its gradient and the optimiser's state": (2 + sizes.momenta) * network.lora,
        "the decoder": look.decoder if look else 0,
        "DINOv3": look.backbone if look else 0,
    }
    tokens, width = z[0] * z[1] * z[2], transformer["num_attention_heads"] * transformer["attention_head_dim"]
    operations = (work.teacher + AGAIN * work.student) * network.operations if work else 0.0
    return Plan(
        sizes, held, network.inputs + network.peak, look.peak if look else 0, all_blocks if sizes.offload else 0,
        operations, tokens, width,
        lambda change: plan(transformer, replace(sizes, **change), decoder, backbone, work),
    )  # fmt: skip


def free_bytes(device: str | torch.device) -> int:
    """What is free on a GPU, or of the host's memory for any other device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
