"""The command line itself: errors that no command expects, and consoles that cannot print every character."""

import os
import shutil

import pytest

import needs
from command import start
from conftest import make_videos
from kvae_comfyui.training.cli import COMMANDS, main
from kvae_comfyui.training.vaes import TINY


def errors_of(*argv, **options):
    """Run the command as a user does; return its exit code and its lines of error."""
    process = start(*argv, **options)
    _, err = process.communicate(timeout=300)
    return process.returncode, err.splitlines()


@needs.linux
def test_out_of_memory_is_an_error_of_one_line(tmp_path):
    import resource

    (video,) = make_videos(tmp_path, 1, frames=9)
    size = ("--height", 8192, "--width", 8192, "--num-frames", 9, "--device", "cpu")
    code, err = errors_of(
        *("reconstruct", "--video-path", video, "--output", tmp_path / "out.mp4", *size),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert code == 2
    assert len(err) == 1 and err[0].startswith("error: out of memory")
    assert list(tmp_path.iterdir()) == [video]


def test_a_console_that_prints_only_ascii_shows_any_name(tmp_path):
    os.mkdir(folder := tmp_path / "caf\udce9")
    code, err = errors_of("train", "--latent-root", folder, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert code == 2
    assert len(err) == 1 and "caf\\udce9" in err[0] and "no .safetensors.zst files" in err[0]


@needs.posix
def test_a_closed_output_is_an_error_of_one_line(tmp_path):
    """As in `python -m training fetch … | head`."""
    shutil.copyfile(TINY["kvae"], tmp_path / "KVAE-3D-1.0.safetensors")
    read, write = os.pipe()
    os.close(read)
    code, err = errors_of("fetch", "--model", "KVAE-3D-1.0", "--output", tmp_path, stdout=write)
    os.close(write)
    assert (code, err) == (2, ["error: nobody reads the output any longer"])


def test_names_cannot_command_a_terminal(tmp_path, capsys):
    assert main(["train", "--latent-root", str(tmp_path / "a\x1b[31m\nb")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err and "a\\x1b[31m\\nb" in err


def test_every_command_lists_its_options(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "-h"])
        assert end.value.code == 0
        assert "--" in capsys.readouterr().out
