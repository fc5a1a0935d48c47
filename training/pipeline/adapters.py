"""Make both adapters from a folder of videos: extract, pack, train and evaluate, by one command.

    python -m training adapters --videos-root UCF101 --output adapters --hunyuan-vae DIR --kvae DIR
    torchrun --nproc_per_node 8 -m training adapters …

First it times a few clips and says what the whole run will take; --plan stops there. The same command continues after
any interruption, with any number of processes. Videos are held out by the splits of UCF101 or by folders train and
test, if there are any; else one in twenty. --output then holds both adapters, README.md (a model card with the measured
figures), report.html, the pairs and their shards.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from ...kvae.foreign import build, parse_object
from ...kvae.paths import read_text, sha256_of, write_text
from ..adapters import train
from ..adapters.config import OutputFiles, TrainConfig, output_files
from ..data import extract, packing
from ..data.dataset import spread
from ..data.videos import find_videos, hold_out
from ..errors import UserError
from ..evaluate import evaluate
from ..evaluate.config import EvaluateConfig
from ..options import DEVICE, HUNYUAN_HELP, KVAE_HELP, MOST_FRAMES, MOST_SIDE, check_values, option
from ..runtime.places import alone_in, shareable
from ..runtime.processes import Processes
from ..runtime.stages import Stages
from ..vaes import weights_file
from .card import README, is_of, write_card
from .plan import STAGES, Plan, check_disk, make_plan

RECORD = "adapters.json"  # settings, videos and plan of the run that a folder holds
MOST_HELD_OUT = 2000  # as many as `train` and `evaluate` read
FREE = ("videos_root", "output", "hunyuan_vae", "kvae", "device", "plan")  # may change between two runs of one folder


@dataclass
class AdaptersConfig:
    videos_root: str = option(..., "folder of videos: UCF101 as it comes unpacked, or any other")
    output: str = option(..., "folder for the adapters, the report and the pairs", writes="folder")
    hunyuan_vae: str = option("tiny", HUNYUAN_HELP, metavar="VAE")
    kvae: str = option("tiny", KVAE_HELP, metavar="VAE")
    max_clips: int = option(0, "largest number of clips to train on, spread over the videos; 0 for all", least=0)
    clips_per_video: int = option(1, "largest number of clips to cut from each video, evenly spaced", least=1)
    num_frames: int = option(33, "frames of a clip", least=5, most=MOST_FRAMES)
    height: int = option(240, "height in pixels, a multiple of 8 or 16, as the VAEs need", least=16, most=MOST_SIDE)
    width: int = option(320, "width in pixels, a multiple of 8 or 16, as the VAEs need", least=16, most=MOST_SIDE)
    epochs: int = option(20, "passes over the pairs in training", least=1)
    device: str = option(DEVICE, "device to run on", metavar="DEVICE")
    plan: bool = option(False, "only say what the run will take")


def run(config: AdaptersConfig) -> int:
    """Make both adapters, or go on with a run that was interrupted; return 0, or 1 if clips were skipped.

    Raises:
        UserError: there are too few videos, the disk is too small, or --output holds another run; or as the stages.
        WeightsError: as the stages.
    """
    processes = Processes(config.device)
    check_values(config)
    job = Job(config, processes)
    plan = job.plan()
    for line in plan.lines(job.extraction("train"), job.out, processes):
        processes.say(line)
    if not job.saved:
        check_disk(plan, job.out)
    if config.plan:
        return 0
    with alone_in(job.out, "run of adapters") if processes.main else nullcontext():
        job.begin(plan)
        return job.run(Stages(plan.seconds, processes.main))


class Job:
    """A run of all stages in one folder.

    Raises:
        UserError: there are too few videos, or the folder holds a run with other settings or videos.
    """

    def __init__(self, config: AdaptersConfig, processes: Processes):
        self.config, self.processes, self.out = config, processes, Path(config.output)
        every = find_videos(config.videos_root)
        train_videos, held_out = hold_out(config.videos_root, every)
        most = math.ceil(config.max_clips / config.clips_per_video) or len(train_videos)
        self.videos = {"train": _some(train_videos, most), "held_out": _some(held_out, MOST_HELD_OUT)}
        names = "\n".join(path.relative_to(config.videos_root).as_posix() for path in every)
        sha256 = hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()
        self.identity = {key: value for key, value in shareable(config).items() if key not in FREE}
        self.identity["videos"] = f"{len(every)}, sha256 of their names {sha256[:16]}"
        for key in ("hunyuan_vae", "kvae"):
            file = weights_file(getattr(config, key), key.removesuffix("_vae"))
            self.identity[key] = f"with sha256 {sha256_of(file)[:16]}"
        self.saved = self._read()
        processes.wait()  # no process may find what another one is about to begin

    def _read(self) -> Plan | None:
        """The plan of the run that the folder holds, which must be this one; None for a new folder."""
        path = self.out / RECORD
        if not path.exists():
            made = [each for each in self.train_files().adapters.values() if each.exists()]
            if made:
                raise UserError(f"{made[0]}: not made by this command; choose another --output")
            return None
        try:
            record = parse_object(read_text(path))
            theirs, plan = dict(record["run"]), build(Plan, record["plan"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the record of a run ({error}); choose another --output") from None
        for key, ours in self.identity.items():
            if theirs.get(key) != ours:
                raise UserError(
                    f"{self.out}: holds a run with {key} {theirs.get(key)}; now {ours}; choose another --output"
                )
        return plan

    def plan(self) -> Plan:
        """What the run takes: measured when it began, and again by --plan."""
        if self.saved and not self.config.plan:
            return self.saved
        config = self.extraction("train")
        return make_plan(config, self.videos["train"], self.videos["held_out"], self.config.epochs, self.processes)

    def begin(self, plan: Plan) -> None:
        """Write the record of a new run.

        Raises:
            UserError: the processes do not share a disk.
        """
        if self.processes.main and not self.saved:
            write_text(self.out / RECORD, json.dumps({"run": self.identity, "plan": asdict(plan)}, indent=1) + "\n")
        self.processes.wait()
        if not all(self.processes.gather((self.out / RECORD).exists())):
            raise UserError(
                f"{self.out}: some of the processes do not see what the first one writes; put --output on a disk that "
                "all nodes share, or run the stages one by one, see docs/training.md"
            )

    def run(self, stages: Stages) -> int:
        """Run the stages that are not done; return 0, or 1 if clips were skipped."""
        code = 0
        if not self.processes.gather(self._trained())[0]:
            code = self._make_adapters(stages)
        if not self.processes.main:
            return code  # evaluation is short, and needs one process
        paths = list(self.train_files().adapters.values())
        if not is_of(self.out, [sha256_of(path) for path in paths]):
            with stages.stage(STAGES[4]):
                evaluate.run(self.evaluation())
            write_card(self.out, shareable(self.config))
        print(f"→ {self.out}: {', '.join(path.name for path in paths)}, {README}")
        return code

    def _make_adapters(self, stages: Stages) -> int:
        codes = []
        for stage, part in zip(STAGES[:2], self.videos, strict=True):
            with stages.stage(stage):
                codes.append(extract.run(self.extraction(part), self.videos[part]))
        with stages.stage(STAGES[2]):
            self._by_first(lambda: [packing.run_pack(self.pack(part)) for part in self.videos])
        with stages.stage(STAGES[3]):
            train.run(self.training())
        return max(codes)

    def _by_first(self, call: Callable[[], object]) -> None:
        """Let the first process do something; the others wait."""
        if self.processes.main:
            call()
        self.processes.wait()

    def _trained(self) -> bool:
        """Whether both adapters are there. The state of a training is deleted after they are written."""
        files = self.train_files()
        return all(path.exists() for path in files.adapters.values()) and not files.state.exists()

    def extraction(self, part: str) -> extract.ExtractConfig:
        """Of the part "train" or "held_out"."""
        config, training = self.config, part == "train"
        return extract.ExtractConfig(
            videos_root=config.videos_root,
            output_root=str(self.out / "pairs" / part),
            hunyuan_vae=config.hunyuan_vae,
            kvae=config.kvae,
            max_clips=config.max_clips if training else 0,
            clips_per_video=config.clips_per_video if training else 1,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            device=config.device,
        )

    def pack(self, part: str) -> packing.PackConfig:
        return packing.PackConfig(str(self.out / "pairs" / part), str(self.out / "shards" / part))

    def training(self) -> TrainConfig:
        return TrainConfig(
            latent_root=str(self.out / "shards" / "train"),
            val_latent_root=str(self.out / "shards" / "held_out"),
            out_h2k=str(self.out / TrainConfig.out_h2k),
            out_k2h=str(self.out / TrainConfig.out_k2h),
            epochs=self.config.epochs,
            device=self.config.device,
        )

    def train_files(self) -> OutputFiles:
        return output_files(self.training())

    def evaluation(self) -> EvaluateConfig:
        files = self.train_files()
        return EvaluateConfig(
            latent_root=str(self.out / "shards" / "held_out"),
            videos_root=self.config.videos_root,
            adapter_h2k=str(files.adapters["h2k"]),
            adapter_k2h=str(files.adapters["k2h"]),
            hunyuan_vae=self.config.hunyuan_vae,
            kvae=self.config.kvae,
            train_latent_root=str(self.out / "shards" / "train"),
            output_root=str(self.out),
            device=self.config.device,
        )


def _some(videos: list[Path], most: int) -> list[Path]:
    return [videos[i] for i in spread(len(videos), most)]
