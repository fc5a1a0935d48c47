"""vfl-cache: everything that training asks for is there, and equals what the encoders make."""

import json
import shutil

import pytest
import torch

import needs
from command import refusal
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.vfl.base import load_encoders
from kvae_comfyui.training.vfl.condition_files import open_cache
from kvae_comfyui.training.vfl.conditions import encode_picture, encode_text
from kvae_comfyui.training.vfl.index import Index
from kvae_comfyui.training.vfl.pictures import cropped, read_picture
from kvae_comfyui.training.vfl.prompts import PromptBank
from kvae_comfyui.training.vfl.tiny import save_tiny
from vfl_pictures import make_folder, pack

needs.package("transformers", "requirements-vfl.txt")
BANK = {"template": '{character} says "{word}".', "character": ["A cat", "A dog"], "word": ["hello", "no"]}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A base, a data set of two identities with two splits, and a bank of four prompts."""
    folder = tmp_path_factory.mktemp("job")
    save_tiny(folder / "base")
    make_folder(folder / "pictures", {"ash": 3, "misty": 5})
    assert pack(folder / "pictures", folder / "data", "--val-share", "0.3") == 0
    (folder / "bank.json").write_text(json.dumps(BANK))
    return folder


def command(job, cache, *more):
    options = {"base": job / "base", "data-root": job / "data", "cache-root": cache, "prompts": job / "bank.json"}
    return ["vfl-cache", *(f"--{name}={value}" for name, value in options.items()), "--device=cpu", *more]


@pytest.fixture(scope="module")
def cache(job):
    assert main(command(job, job / "cache", "--crops-per-picture=2", "--crop-ratio=0.7", "--crop-jitter=0.25")) == 0
    return job / "cache"


def test_all_that_training_asks_for_is_there(job, cache):
    files, pipe = open_cache(cache), load_encoders(str(job / "base"), "cpu", torch.float32)
    for prompt in ("", *PromptBank(job / "bank.json").prompts()):
        for found, expected in zip(files.text(prompt), encode_text(pipe, prompt), strict=True):
            assert torch.equal(found, expected)
    index = Index(job / "data", "train")
    sizes = set()
    for k in range(8):
        data = index.sample(0, k, read=bytes).picture
        picture = read_picture(data)
        box, size = files.info.view(data, *picture.shape[1:], k % 2)
        sizes.add(box)
        for found, expected in zip(
            files.picture(data, box, size), encode_picture(pipe, cropped(picture, box, size)), strict=True
        ):
            assert torch.equal(found, expected)
    assert len(sizes) > 1
    data = Index(job / "data", "val").sample(0, 0, read=bytes).picture
    assert files.picture(data, *files.info.view(data, *read_picture(data).shape[1:], None))


def test_the_same_command_encodes_nothing_again(job, cache, capsys):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    victim = next(iter(before))
    victim.unlink()
    assert main(command(job, cache, "--crops-per-picture=2", "--crop-ratio=0.7", "--crop-jitter=0.25")) == 0
    out = capsys.readouterr().out
    assert ("1 of 5 prompts and 0 of" in out) != ("0 of 5 prompts and 1 of" in out)
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path != victim)


def test_without_crops_there_is_one_view_of_each_picture(job, tmp_path, capsys):
    capsys.readouterr()
    assert main(command(job, tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "5 of 5 prompts and 8 of 8 views of pictures encoded, 0 skipped" in out
    assert "Loading" not in err and "torchvision" not in err  # diffusers and transformers are quiet
    info = open_cache(tmp_path).info
    assert info.base == "base"  # a file that people share says nothing of this machine
    assert (info.crops, info.crop_ratio, info.target_size) == (1, 1.0, 32)
    assert info.view(b"", 300, 200, 0) == info.view(b"", 300, 200, None)


def cut_text_encoder(base):
    weights = base / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_tokenizer(base):
    shutil.rmtree(base / "tokenizer")


def test_bad_input_is_refused(job, tmp_path, capsys):
    def refused(**changes):
        options = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
        return refusal(command(job, tmp_path / "c", *options), capsys)

    assert "no pipeline of HunyuanVideo 1.5 can be read there" in refused(base=tmp_path)
    for damage in (cut_text_encoder, lose_tokenizer):
        shutil.copytree(job / "base", tmp_path / damage.__name__)
        damage(tmp_path / damage.__name__)
        assert "no pipeline of HunyuanVideo 1.5 can be read there" in refused(base=tmp_path / damage.__name__)
    assert "no such manifest; write it by `python -m training vfl-pack" in refused(data_root=tmp_path)
    (tmp_path / "bank.json").write_text("{}")
    assert "not a bank of prompts" in refused(prompts=tmp_path / "bank.json")
    assert refused(prompts=tmp_path / "none.json").endswith("none.json: no such file")
    (tmp_path / "bank.json").write_text(json.dumps({"template": "{a} {b}", "a": ["a"] * 200, "b": ["b"] * 101}))
    assert "makes 20,200 prompts; expected 20,000 at most" in refused(prompts=tmp_path / "bank.json")
    assert not (tmp_path / "c").exists()
