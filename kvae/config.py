"""What makes one KVAE-3D model: the numbers of its config.json, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

SEGMENT_FRAMES = 16  # after the first frame; GroupNorm runs over a segment, so this is part of the model


@dataclass(frozen=True)
class KVAEConfig:
    """Shape of a KVAE-3D-1.0 model. The defaults are the published model (617,982,115 parameters).

    The field names are those of the diffusers config.json; `norm_groups` is ours, so that narrow models
    can keep several channels in a group.
    """

    ch: int = 128  # channels at full resolution
    ch_mult: tuple[int, ...] = (1, 2, 4, 8)  # channels per level, in units of ch; each level halves H and W
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    z_channels: int = 16
    temporal_compress_times: int = 4  # halved at the first levels of the encoder
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        if self.temporal_compress_times not in (1, 2, 4, 8):
            raise ValueError(f"temporal_compress_times is {self.temporal_compress_times}; expected 1, 2, 4 or 8")
        for mult in self.ch_mult:
            if self.ch * mult % self.norm_groups:
                raise ValueError(
                    f"a level of {self.ch * mult} channels does not divide into norm_groups={self.norm_groups}; "
                    "choose ch and ch_mult so that every level does"
                )

    @property
    def temporal_levels(self) -> int:
        """How many of the levels halve time."""
        return self.temporal_compress_times.bit_length() - 1

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def from_dict(cls, values: dict) -> KVAEConfig:
        """Read a config.json. Keys that describe training or the library are ignored; ours override the defaults."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict:
        """The fields as JSON takes them."""
        return asdict(self) | {"ch_mult": list(self.ch_mult)}
