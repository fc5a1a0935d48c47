"""Set up the training of a LoRA: pictures, head, base, LoRA, optimiser. What cannot be trained is refused here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import HybridVAE, load_adapter
from ...adapters.spaces import native_space
from ...kvae import load_kvae
from ...kvae.paths import sha256_of
from ..adapters.muon import Muon
from ..errors import UserError
from ..runtime.processes import Processes
from ..runtime.trainer import Trainer, open_state
from ..served import AUTO
from ..vaes import weights_file
from .backbone import load_backbone
from .base import load_config, load_shift, load_transformer, load_vae
from .cache import EMPTY
from .condition_files import ConditionFiles, open_cache
from .decoders import SPACE, Decode, hunyuan_decoder, kvae_decoder
from .head_files import load_head
from .identity import Embedder
from .index import Index, pictures_hash
from .lora import add_lora, lora_parameters, put_lora
from .lora_reading import lora_file, read_lora
from .placement import BASE_DTYPES, place
from .prompts import BANK, PromptBank
from .samples import Source
from .schedule import Cosine
from .step import Recipe
from .train_config import NAMES, Progress, VflTrainConfig, recipe_of


class Weights(nn.Module):
    """The weights of a LoRA alone, by their names in its network."""

    def __init__(self, transformer: Any):
        super().__init__()
        for name, parameter in lora_parameters(transformer).items():
            self.register_parameter(name.replace(".", "/"), parameter)


@dataclass(frozen=True)
class LoraTraining:
    """A training: its trainer, which changes with every step, and everything that stays the same.

    Attributes:
        data: hashes of what it trains on, by name.
        transformer: the network, with the LoRA.
        decode: scaled latents → pixels, differentiable.
        embed: p_B3HW → e_BE, by which the identity loss judges.
        second: p_B3HW → features [B, D] that the loss does not see.
        skipped: pictures that this process could not read, as "id: reason".
    """

    config: VflTrainConfig
    processes: Processes
    folder: Path
    recipe: Recipe
    train: Source
    val: Source
    data: dict[str, str]
    transformer: Any
    decode: Decode
    embed: Embedder
    second: Callable[[Tensor], Tensor]
    trainer: Trainer[Weights, Progress]
    skipped: set[str] = field(default_factory=set)

    @property
    def dtype(self) -> torch.dtype:
        """In which the network is told of pictures and prompts."""
        return BASE_DTYPES[self.config.base_dtype]

    @property
    def shards(self) -> int:
        """The processes among which the base is divided."""
        return self.processes.count if self.config.shard else 1

    @property
    def lasting(self) -> VflTrainConfig:
        """The settings that a resumed training may not change: where the base lies changes nothing."""
        return replace(self.config, offload=False, shard=False)

    def file(self, name: str) -> Path:
        """One of NAMES, in the folder."""
        return self.folder / NAMES[name]


def set_up(config: VflTrainConfig, processes: Processes) -> LoraTraining:
    """Open pictures, cache and head, and load the base.

    Args:
        config: checked and resolved.

    Raises:
        UserError: something is not what it should be or does not fit the rest, the state of an unfinished training
            does not fit, or the processes see different data.
    """
    network, recipe = load_config(config.base), recipe_of(config, load_shift(config.base))
    files, bank = open_cache(Path(config.cache_root)), PromptBank(config.prompts or BANK)
    check_cache(config, files, network)
    train, val = (Index(config.data_root, split, config.identity_key) for split in ("train", "val"))
    sources = (
        Source(train, files, bank, config.seed, config.p_secondary, opacity=config.appearance_weight > 0),
        Source(val, files, bank, config.seed, whole=True),
    )
    data = data_hashes(config, files, bank, train, val)
    if any(theirs != data for theirs in processes.gather(data)):
        raise UserError(f"{config.data_root}: the processes do not see the same pictures, cache, head and prompts")
    folder = Path(config.output_root)
    open_state(folder / NAMES["state"], replace(config, offload=False, shard=False), data)  # refused before the base
    backbone = load_backbone(config.backbone, config.device)
    embed = Embedder(backbone, load_head(Path(config.head), backbone)[0]).to(processes.device)
    second = load_backbone(config.second_backbone, config.device) if config.second_backbone else backbone
    decode = load_decoder(config)
    transformer = load_student(config, processes)
    trainer = new_trainer(config, transformer)
    return LoraTraining(
        config, processes, folder, recipe, *sources, data, transformer, decode, embed, second, trainer
    )  # fmt: skip


def resolved(config: VflTrainConfig, processes: Processes) -> VflTrainConfig:
    """The settings with this process's device, and a precision in the place of auto.

    Raises:
        UserError: the processes cannot share a step.
    """
    if config.batch % processes.count:
        raise UserError(f"--batch is {config.batch}, for {processes.count} processes; expected a multiple of that")
    if config.shard and processes.count == 1:
        raise UserError("--shard divides the base among processes, and there is one; start more, by torchrun")
    auto = "bf16" if processes.device.type == "cuda" else "fp32"
    base_dtype = auto if config.base_dtype == AUTO else config.base_dtype
    return replace(config, device=str(processes.device), base_dtype=base_dtype)


def check_cache(config: VflTrainConfig, files: ConditionFiles, network: dict[str, Any]) -> None:
    """Refuse a cache of other encoders or sizes than the network's.

    Raises:
        UserError: names both.
    """
    found = files.text(EMPTY)
    ours = found.states.shape[1], found.glyphs.shape[1], files.info.target_size
    theirs = network["text_embed_dim"], network["text_embed_2_dim"], network["target_size"]
    if ours != theirs:
        raise UserError(
            f"{config.cache_root}: made for {files.info.base}, with texts {ours[0]} and glyphs {ours[1]} wide and "
            f"pictures of {ours[2]} px; {config.base} takes {theirs[0]}, {theirs[1]}, {theirs[2]}: run vfl-cache for it"
        )


def data_hashes(
    config: VflTrainConfig, files: ConditionFiles, bank: PromptBank, train: Index, val: Index
) -> dict[str, str]:
    """What is trained on, by name."""
    prompts = hashlib.sha256(json.dumps(list(bank.prompts())).encode()).hexdigest()
    return {
        "pictures": pictures_hash(train, val),
        "cache": json.dumps(asdict(files.info)),
        "prompts": prompts,
        "head": sha256_of(Path(config.head)),
        "LoRA to start from": sha256_of(lora_file(Path(config.start_from))) if config.start_from else "",
    }


def load_decoder(config: VflTrainConfig) -> Decode:
    """What the identity loss sees clips through.

    Raises:
        UserError: there is no adapter.
        WeightsError: a file is not what it should be, or does not fit the others.
    """
    dtype = BASE_DTYPES[config.base_dtype]
    if not config.kvae:
        return hunyuan_decoder(load_vae(config.base, dtype).to(config.device))
    if not config.adapter_h2k:
        raise UserError("--adapter-h2k is missing: --kvae decodes HunyuanVideo 1.5's latents through an adapter")
    kvae = load_kvae(weights_file(config.kvae, "kvae"), dtype, config.device)
    ways = SPACE.name, native_space(kvae.config).name
    return kvae_decoder(HybridVAE(kvae, decode_adapter=load_adapter(config.adapter_h2k, ways, config.device)))


def load_student(config: VflTrainConfig, processes: Processes) -> Any:
    """The base with its LoRA, where it is trained.

    Raises:
        UserError, WeightsError: the base cannot be read, or the LoRA to start from is none of it.
    """
    start = read_lora(Path(config.start_from)).layers if config.start_from else None
    transformer = load_transformer(config.base, BASE_DTYPES[config.base_dtype])
    if start:
        put_lora(transformer, start)
    else:
        add_lora(transformer, config.targets, config.rank, config.alpha, config.seed)
    shards = processes.count if config.shard else 1
    place(transformer, processes.device, config.base_dtype, config.offload, shards)
    return transformer


def new_trainer(config: VflTrainConfig, transformer: Any) -> Trainer[Weights, Progress]:
    """The LoRA's weights, and their optimiser."""
    weights = Weights(transformer)
    kind: Any = Muon if config.optimiser == "muon" else torch.optim.AdamW
    optimiser = kind(list(weights.parameters()), lr=config.lr, weight_decay=config.weight_decay)
    schedule = Cosine(config.lr, config.steps, config.warmup)
    return Trainer({"lora": weights}, [optimiser], schedule, ema=0, progress=Progress())
