"""Which videos are held out: those of a split, if there is one; else a twentieth, and never a part of what belongs
together."""

from pathlib import Path

import pytest

from kvae_comfyui.training.data.videos import find_videos, hold_out
from kvae_comfyui.training.errors import UserError


def plant(root: Path, names: list[str]) -> tuple[set[str], set[str]]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    train, held_out = hold_out(root, find_videos(root))
    both = tuple({path.relative_to(root).as_posix() for path in part} for part in (train, held_out))
    assert both[0] | both[1] == set(names) and not both[0] & both[1]
    return both


def test_groups_of_ucf101(tmp_path):
    names = [f"{name}/v_{name}_g{group:02d}_c01.avi" for name in ("Archery", "Bowling") for group in (1, 7, 8, 25)]
    assert plant(tmp_path, names)[1] == {name for name in names if "_g01" in name or "_g07" in name}


def test_folders_train_and_test(tmp_path):
    assert plant(tmp_path, ["train/a.mp4", "train/b.mp4", "test/c.mp4"])[1] == {"test/c.mp4"}


def test_a_folder_test_within_train_is_no_split(tmp_path):
    """Its videos would be in both."""
    assert len(plant(tmp_path, ["train/test/a.mp4", "train/b.mp4", "train/c.mp4"])[1]) == 1


def test_a_twentieth_of_the_videos_clips_of_one_together(tmp_path):
    names = [f"video{i:02d}_c{clip:02d}.mp4" for i in range(40) for clip in (1, 2, 3)]
    held_out = plant(tmp_path, names)[1]
    assert len(held_out) == 6 and len({name.split("_")[0] for name in held_out}) == 2


def test_a_twentieth_of_the_folders_if_there_are_many(tmp_path):
    names = [f"film{i:02d}/{scene}.mp4" for i in range(40) for scene in "abc"]
    held_out = plant(tmp_path, names)[1]
    assert len(held_out) == 6 and len({name.split("/")[0] for name in held_out}) == 2


def test_one_source_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="2 videos of one source; expected at least two"):
        plant(tmp_path, ["a_c01.mp4", "a_c02.mp4"])
