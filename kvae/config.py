"""The numbers that define a KVAE-3D model: those of its config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .foreign import build
from .spellings import fields_of

SEGMENT_FRAMES = 16  # the first segment has one more; GroupNorm runs over a segment, so this defines models with it


@dataclass(frozen=True)
class KVAEConfig:
    """The sizes and variants of a KVAE-3D model. The defaults are those of KVAE-3D-1.0.

    Raises:
        ValueError: the numbers do not define a model of the family.
    """

    encoder_widths: tuple[int, ...] = (128, 256, 512, 1024)  # channels per level; each level halves H and W
    decoder_widths: tuple[int, ...] = (128, 256, 512, 1024)
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    z_channels: int = 16
    temporal_compress_times: int = 4
    temporal_start_level: int = 0  # the first encoder level that halves time
    norm: str = "group"  # "group": GroupNorm over a segment; "rms": over the channels of each position
    norm_groups: int = 32
    downsample_version: int = 1  # 2: downsampling doubles the channels
    padding: str = "replicate"  # of rows and columns: "replicate" or "zeros"

    def __post_init__(self) -> None:
        for name in ("encoder_widths", "decoder_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in (
            ("temporal_compress_times", (1, 2, 4, 8)),
            ("norm", ("group", "rms")),
            ("downsample_version", (1, 2)),
            ("padding", ("replicate", "zeros")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {choices}")
        if len(self.encoder_widths) != len(self.decoder_widths):
            raise ValueError(
                f"encoder_widths has {len(self.encoder_widths)} levels, decoder_widths {len(self.decoder_widths)}"
            )
        if self.temporal_levels.stop > len(self.encoder_widths) - 1:
            raise ValueError(
                f"{len(self.encoder_widths)} levels are too few to compress time {self.temporal_compress_times} times, "
                f"starting at level {self.temporal_start_level}"
            )
        if self.norm_groups < 1:
            raise ValueError(f"norm_groups is {self.norm_groups}; expected at least 1")
        for width in (*self.encoder_widths, *self.decoder_widths):
            if self.norm == "group" and width % self.norm_groups:
                raise ValueError(f"a level of {width} channels does not divide into norm_groups={self.norm_groups}")

    @property
    def temporal_levels(self) -> range:
        """The encoder levels that halve time. The decoder doubles it at the same levels, counted from the latent."""
        return range(
            self.temporal_start_level, self.temporal_start_level + self.temporal_compress_times.bit_length() - 1
        )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent row or column."""
        return 2 ** (len(self.encoder_widths) - 1)

    @property
    def norm_is_per_position(self) -> bool:
        """Whether norms use the channels of one position only, so that any segmentation gives the same values."""
        return self.norm == "rms"

    @classmethod
    def from_dict(cls, values: dict) -> KVAEConfig:
        """Read a config in any spelling that `spellings` knows.

        Raises:
            ValueError, OverflowError: the values do not define a model of the family.
        """
        return build(cls, fields_of(values))

    def to_dict(self) -> dict:
        """The fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


# https://huggingface.co/kandinskylab: KVAE-3D-1.0, KVAE-3D-2.0-t4s8, KVAE-3D-2.0-t4s16
FAMILY = {
    "1.0": KVAEConfig(),
    "2.0-t4s8": KVAEConfig(norm="rms", downsample_version=2),
    "2.0-t4s16": KVAEConfig(
        encoder_widths=(16, 128, 256, 512, 1024),
        decoder_widths=(16, 256, 512, 1024, 2048),
        z_channels=64,
        temporal_start_level=1,
        norm="rms",
        downsample_version=2,
        padding="zeros",
    ),
}
