"""vfl-export: one LoRA for all programs, from any of them."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from command import refusal
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.vfl.lora_files import FORMATS, write_lora
from kvae_comfyui.training.vfl.lora_pairs import Pair
from kvae_comfyui.training.vfl.lora_reading import read_lora

NAMES = ["norm_out.linear", *(f"transformer_blocks.0.attn.to_{each}" for each in "qkv")]


@pytest.fixture
def loras(tmp_path):
    """A LoRA in all formats."""
    generator = torch.Generator().manual_seed(0)
    pairs = [Pair(*(torch.randn(*shape, generator=generator) for shape in ((2, 8), (8, 2))), 1.0) for _ in NAMES]
    return dict(zip(FORMATS, write_lora(tmp_path / "in", "cat", dict(zip(NAMES, pairs, strict=True))), strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_any_file_becomes_all_files(format, loras, tmp_path, capsys):
    path = loras[format].parent if format == "peft" else loras[format]
    assert main(["vfl-export", str(path), "--output", str(tmp_path / "out")]) == 0
    assert f"format {format}, 4 layers, rank 2, alpha {2 if format == 'diffusers' else 1}" in capsys.readouterr().out
    expected = read_lora(loras["diffusers"]).layers  # with alpha = r
    for each, original in loras.items():
        found = read_lora(tmp_path / "out" / original.relative_to(tmp_path / "in"))
        assert found.format == each
        for name, pair in found.layers.items():
            assert torch.equal(pair.scale * pair.b @ pair.a, expected[name].b @ expected[name].a), name


def test_the_same_command_continues(loras, tmp_path, capsys):
    command = ["vfl-export", str(loras["peft"].parent), "--output", str(tmp_path / "out")]
    assert main([*command, "--format", "comfyui"]) == 0
    (comfyui,) = (tmp_path / "out").iterdir()
    before = comfyui.read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"{comfyui}: already there" in out and out.count("already there") == 1 and out.count(" MB") == 3
    assert comfyui.read_bytes() == before


def test_nothing_else_is_overwritten(loras, tmp_path, capsys):
    folder = loras["comfyui"].parent
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    err = refusal(["vfl-export", str(loras["comfyui"]), "--output", str(folder)], capsys)
    assert "is there already, and not made of this LoRA; choose another --output" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_what_is_no_lora_is_refused(loras, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert "no such file" in refusal(["vfl-export", str(tmp_path / "none"), *output], capsys)
    save_file({"decoder.mid.block_1.norm1.conv_y.weight": torch.ones(1)}, tmp_path / "vae.safetensors")
    assert "this is a KVAE-3D; expected a LoRA" in refusal(
        ["vfl-export", str(tmp_path / "vae.safetensors"), *output], capsys
    )
    (tmp_path / "lora.safetensors").write_bytes(loras["musubi"].read_bytes()[:-1])
    assert "cut short" in refusal(["vfl-export", str(tmp_path / "lora.safetensors"), *output], capsys)
    shutil.copyfile(loras["musubi"], tmp_path / "lora.pt")
    assert "a pickle can run code" in refusal(["vfl-export", str(tmp_path / "lora.pt"), *output], capsys)
    assert not (tmp_path / "out").exists()
