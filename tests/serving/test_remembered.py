"""Files are made once of the same objects with the same settings, and anew if anything differs."""

import gc
import os

import pytest
import torch

from kvae_comfyui.serving.remembered import Remembered


@pytest.fixture
def ask(tmp_path):
    """Ask for the files of some objects; returns their names and whether they were made for it."""
    files, made = Remembered(), []

    def ask(made_of, *settings):
        def make():
            path = tmp_path / f"{len(made)}.mp4"
            path.write_bytes(b"video")
            made.append(path)
            return [str(path)]

        before = len(made)
        (path,) = files.of(made_of, settings, make)
        return os.path.basename(path), len(made) > before

    ask.files, ask.folder = files, tmp_path
    return ask


def test_files_are_made_once_of_the_same_objects_with_the_same_settings(ask):
    z, other = torch.zeros(1), torch.zeros(1)
    assert ask([z], 24.0) == ("0.mp4", True)
    assert ask([z], 24.0) == ("0.mp4", False)
    assert ask([other], 24.0) == ("1.mp4", True)  # equal, but not the same
    assert ask([z, other], 24.0) == ("2.mp4", True)
    assert ask([z], 25.0) == ("3.mp4", True)
    assert ask([z], 24.0) == ("0.mp4", False)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_file_that_is_no_longer_as_it_was_is_made_anew(ask, change):
    z = torch.zeros(1)
    ask([z])
    path = ask.folder / "0.mp4"
    path.unlink() if change == "deleted" else path.write_bytes(b"another video")
    assert ask([z]) == ("1.mp4", True)
    assert ask([z]) == ("1.mp4", False)


def test_objects_are_not_kept_alive_and_their_files_are_forgotten(ask):
    z = torch.zeros(1)
    ask([z])
    del z
    gc.collect()
    assert ask([torch.zeros(1)]) == ("1.mp4", True)
    assert len(ask.files._made) == 1


def test_a_failure_is_not_remembered(ask):
    z = torch.zeros(1)
    with pytest.raises(ZeroDivisionError):
        ask.files.of([z], (), lambda: [1 // 0])
    assert ask([z]) == ("0.mp4", True)
