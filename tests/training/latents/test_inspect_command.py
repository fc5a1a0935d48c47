"""The command `inspect` says of files what the node Inspect Latent says of latents."""

import os

import torch

import needs
from command import start
from kvae_comfyui.serving.inspect import describe
from kvae_comfyui.serving.latent_writers import save_latent
from kvae_comfyui.training.cli import main


def test_each_file_has_a_block_and_each_fault_a_line(tmp_path, capsys):
    z, audio = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 8, 26, 16)
    save_latent(tmp_path / "a.latent", z, "kvae_3d_1.0", 7, {}, [audio])
    save_latent(tmp_path / "below" / "b.latent", z, None, None, {})
    (tmp_path / "bad.latent").write_text("no latent")
    assert main(["inspect", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    a, b, end = out.split("\n\n")
    assert a == "\n".join([
        f"{tmp_path / 'a.latent'}",
        "Read as a ComfyUI latent. The clip had 7 frames.",
        describe(z, "kvae_3d_1.0", [audio]),
    ])  # fmt: skip
    assert b == f"{tmp_path / 'below' / 'b.latent'}\nRead as a ComfyUI latent.\n{describe(z)}"
    assert end == ""
    (line,) = err.splitlines()
    assert line.startswith(f"skipped: {tmp_path / 'bad.latent'}: cut short or not a safetensors file")


def test_how_files_are_read_can_be_said(tmp_path, capsys):
    save_latent(tmp_path / "a.latent", torch.randn(1, 16, 3, 4, 6), None, None, {})
    assert main(["inspect", str(tmp_path / "a.latent"), "--scaling", "scaled", "--model", "kandinsky5"]) == 0
    assert "Space: hunyuan_video" in capsys.readouterr().out


@needs.posix
def test_a_closed_output_ends_the_run_and_blames_no_file(tmp_path):
    """As in `python -m training inspect … | head`."""
    for name in "ab":
        save_latent(tmp_path / f"{name}.latent", torch.randn(1, 16, 3, 4, 6), None, None, {})
    read, write = os.pipe()
    os.close(read)
    process = start("inspect", tmp_path, stdout=write, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    os.close(write)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (2, "error: nobody reads the output any longer\n")
