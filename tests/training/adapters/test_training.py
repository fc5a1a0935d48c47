"""A training that is interrupted resumes to the same result; a training that cannot work is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

import needs
from at_step import after_steps, at_step, ctrl_c
from command import refusal
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.training.adapters.config import TrainConfig
from kvae_comfyui.training.adapters.training_pairs import split
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.data.pairs import Pair, Source, write_pair
from kvae_comfyui.training.runtime import saves
from kvae_comfyui.training.runtime.log import read_log

VAE = {"sha256": "0" * 64}
MANIFEST = {
    "settings": {},
    "hunyuan_vae": VAE | {"space": "hunyuan_video"},
    "kvae": VAE | {"space": "kvae_3d_1.0"},
}


def make_pairs(folder, count=6, first=0, width=14, channels=16):
    for i in range(first, first + count):
        z = torch.randn(16, 3, 12, width, generator=torch.Generator().manual_seed(i))
        write_pair(folder / f"v{i:02d}.safetensors.zst", Pair(z[:channels], z.flip(0) ** 2, None))
    return folder


def options(folder, out="out", network="affine"):
    """Options for batches of two pairs: six pairs give 3 steps in an epoch."""
    out = folder / out
    return [
        *("--latent-root", str(folder / "pairs"), "--val-latent-root", str(folder / "val"), "--device", "cpu"),
        *("--out-h2k", str(out / "h.safetensors"), "--out-k2h", str(out / "k.safetensors"), "--network", network),
        *("--batch-size", "2", "--epochs", "3"),
    ]


@pytest.fixture
def folder(tmp_path):
    make_pairs(tmp_path / "pairs")
    make_pairs(tmp_path / "val", 2, first=50)
    return tmp_path


def train(*argv):
    return main(["train", *argv])


def interrupt(folder):
    """Interrupt a training in step 5, the second of the second epoch; returns its state."""
    with at_step(4, ctrl_c):
        assert train(*options(folder)) == 130
    return folder / "out" / "h.resume.safetensors"


def other_pairs(folder, change):
    """Change the pairs; returns the words with which a training refuses the change."""
    if change == "more":
        make_pairs(folder / "pairs", 8, first=6)
        return "had 6 training pairs, now 14"
    if change == "fewer":
        for path in sorted((folder / "pairs").iterdir())[2:]:
            path.unlink()
        return "had 6 training pairs, now 2"
    if change == "others":
        (folder / "pairs" / "v00.safetensors.zst").rename(folder / "pairs" / "w.safetensors.zst")
        return "had other training pairs than there are now"
    if change == "larger":
        make_pairs(folder / "pairs", width=15)
        return "had other training pairs than there are now"
    if change == "validation":
        make_pairs(folder / "val", 1, first=9)
        return "had 2 validation pairs, now 3"
    (folder / "pairs" / "manifest.json").write_text(json.dumps(MANIFEST))
    return "had other VAEs than there are now"


@pytest.mark.parametrize("change", ["more", "fewer", "others", "larger", "validation", "VAEs"])
def test_a_training_does_not_resume_with_other_pairs(folder, capsys, change):
    """The advice in the error helps."""
    state = interrupt(folder)
    words = other_pairs(folder, change)
    err = refusal(["train", *options(folder)], capsys)
    assert f"{state}: an unfinished run {words}; delete the file to start anew" in err
    state.unlink()
    assert train(*options(folder)) == 0


def damaged(path, what):
    """Damage a state in the given way."""
    tensors = load_file(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header["__metadata__"]
    progress = json.loads(metadata["progress"])
    kind, _, rest = what.partition(" ")
    if kind == "without":
        metadata.pop(rest, None)
        tensors.pop(rest, None)
    elif kind == "reshaped":
        tensors[rest] = tensors[rest].flatten()[:1].clone()
    elif kind == "extra":
        tensors[rest] = torch.zeros(1)
    elif kind == "nested":
        metadata[rest] = "[" * 100_000
    else:
        metadata["progress"] = json.dumps(progress | json.loads(what))
    save_file(tensors, path, metadata)


STATES_OF_OTHERS = [
    "without progress", "without pairs", "without config", "nested progress", "nested config", "nested pairs",
    "without live.h2k.affine.conv.weight", "without best.k2h.affine.conv.bias",
    "reshaped average.h2k.affine.conv.weight", "reshaped optimiser0.0.exp_avg",
    "extra optimiser0.99.exp_avg", "extra optimiser0.x.exp_avg", "extra optimiser0.0.exp_avg.more",
    '{"step": -1}', '{"step": "4"}', '{"step": 100}', '{"step": null}', '{"epoch": -1}', '{"epoch": 1.5}',
    '{"sums": []}', '{"sums": [1, 2]}', '{"sums": "abc"}', '{"sums": null}', '{"rows": -1}',
    '{"best_mse": {}}', '{"best_mse": {"h2k": "1", "k2h": 2}}', '{"best_mse": 3}',
]  # fmt: skip


def test_a_malformed_state_is_an_error_of_one_line(folder, capsys):
    state = interrupt(folder)
    good = state.read_bytes()
    for what in STATES_OF_OTHERS:
        damaged(state, what)
        err = refusal(["train", *options(folder)], capsys)
        assert "not the state of a training run" in err and "delete it to start anew" in err, what
        state.write_bytes(good)
    for data in (b"", good[: len(good) // 2], b"\xff" * 100):
        state.write_bytes(data)
        assert "not the state of a training run" in refusal(["train", *options(folder)], capsys)
    state.write_bytes(good)
    assert train(*options(folder)) == 0


def test_a_damaged_log_does_not_stop_a_training(folder):
    """The last line is cut off, as on a full disk, and other lines are not rows of a log."""
    interrupt(folder)
    log = folder / "out" / "train.jsonl"
    rows = read_log(log)
    assert [row["step"] for row in rows] == [0, 3, 3]
    nested = "[" * 100_000
    log.write_text(log.read_text() + f'null\n{nested}\n{{"step": "3"}}\n{{"step": 6, "tra')
    assert read_log(log) == rows
    assert train(*options(folder)) == 0
    assert [row["step"] for row in read_log(log)] == [0, 3, 3, 6, 6, 9, 9]


def test_a_row_is_logged_once_wherever_a_run_is_killed(folder, monkeypatch):
    """A timed save happens at the last step of an epoch; the run is killed after the epoch's row, before its save."""
    assert train(*options(folder, "whole")) == 0
    monkeypatch.setattr(saves, "SAVE_SECONDS", -1)
    log = folder / "out" / "train.jsonl"

    def killed(*_):
        if torch.is_inference_mode_enabled() and log.exists() and [row["step"] for row in read_log(log)][-1:] == [6]:
            raise SystemExit("as by kill -9, as the validation at step 6 begins")

    hook = register_module_forward_pre_hook(killed)
    try:
        with pytest.raises(SystemExit):
            train(*options(folder))
    finally:
        hook.remove()
    assert [row["step"] for row in read_log(log)] == [0, 3, 3, 6]
    assert train(*options(folder)) == 0
    timeless = [
        [{key: value for key, value in row.items() if key not in ("seconds", "waited")} for row in read_log(each)]
        for each in (folder / "whole" / "train.jsonl", log)
    ]
    assert timeless[0] == timeless[1]


@needs.linux
def test_a_resumed_training_does_not_keep_its_state_file_mapped(folder):
    """Windows cannot replace a mapped file, and every save replaces the state."""
    state = interrupt(folder)
    mapped = []
    with after_steps(lambda *_: mapped.append(str(state) in Path("/proc/self/maps").read_text())):
        assert train(*options(folder)) == 0
    assert mapped == [False] * 4


@pytest.mark.parametrize("value", [0.0, 5.0, -0.3])
@pytest.mark.parametrize("latent", ["z_h", "z_k"])
def test_latents_without_variance_are_refused_before_the_training(folder, capsys, value, latent):
    for i in range(6):
        z, flat = torch.randn(16, 3, 12, 14), torch.full((16, 3, 12, 14), value)
        pair = Pair(flat, z, None) if latent == "z_h" else Pair(z, flat, None)
        write_pair(folder / "pairs" / f"v{i:02d}.safetensors.zst", pair)
    assert f"{latent} is the same everywhere" in refusal(["train", *options(folder)], capsys)
    assert not (folder / "out").exists()


def test_validation_pairs_without_variance_do_not_end_a_training(folder):
    for i in range(2):
        z = torch.zeros(16, 3, 12, 14)
        write_pair(folder / "val" / f"v{50 + i}.safetensors.zst", Pair(z, z.clone(), None))
    assert train(*options(folder)) == 0
    assert load_adapter(folder / "out" / "h.safetensors").metrics["val_pairs"] == 2
    assert "Infinity" not in (folder / "out" / "report.json").read_text()


@needs.posix
def test_pairs_with_names_of_another_encoding_are_trained_on(folder):
    name = b"caf\xe9.safetensors.zst".decode(errors="surrogateescape")
    (folder / "pairs" / "v00.safetensors.zst").rename(folder / "pairs" / name)
    (folder / "val" / "v50.safetensors.zst").rename(folder / "val" / name)
    assert train(*options(folder)) == 0
    assert len(load_adapter(folder / "out" / "h.safetensors").training_info["pairs_sha256"]) == 64
    assert "caf" in (folder / "out" / "report.html").read_text()


@pytest.mark.parametrize("part", ["pairs", "val"])
def test_pairs_of_other_channels_are_refused_before_the_closed_form(folder, capsys, part):
    make_pairs(folder / part, 1, first=3, channels=8)
    err = refusal(["train", *options(folder)], capsys)
    assert f"{folder / part}: holds pairs of 8 and 16 channels; expected 16 (hunyuan_video) and 16 (kvae_3d_1.0)" in err
    assert not (folder / "out").exists()


def test_files_that_would_overwrite_each_other_are_refused(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "here").symlink_to(folder)
    for h2k, k2h in (
        ("out/./k.safetensors", "out/k.safetensors"),
        ("out/../k.safetensors", "k.safetensors"),
        ("k.safetensors", str(folder / "k.safetensors")),
        ("here/k.safetensors", "k.safetensors"),
        ("out/train.json", "out/k.safetensors"),
        ("out/h.safetensors", "out/train.jsonl"),
        ("out/h.safetensors", "out/report.json"),
        ("out/h.safetensors", "out/h.resume.safetensors"),
    ):
        argv = [*options(folder), "--out-h2k", h2k, "--out-k2h", k2h]
        assert "would overwrite the other" in refusal(["train", *argv], capsys), (h2k, k2h)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("--lr", ("0", "-1", "inf", "nan")),
        ("--weight-decay", ("-1", "inf", "nan")),
        ("--ema", ("1", "-0.1", "nan")),
        ("--seed", ("-1", str(2**80))),
        ("--epochs", ("0", "-1")),
        ("--batch-size", ("0", "-1")),
    ],
)
def test_impossible_numbers_are_refused(folder, capsys, name, values):
    for value in values:
        assert name in refusal(["train", *options(folder), f"{name}={value}"], capsys), value
    assert not (folder / "out").exists()


def test_a_diverging_training_ends_in_one_line_and_can_be_restarted(folder, capsys):
    """Otherwise it would save the closed form, as if nothing had gone wrong."""
    err = refusal(["train", *options(folder, network="published"), "--lr", "1e30"], capsys)
    assert "the error is nan" in err and "lower --lr" in err
    assert train(*options(folder, network="published"), "--lr", "1e-4") == 0


def test_a_video_with_dots_in_its_name_can_be_held_out(tmp_path):
    """scene.0000a … scene.0005a are six videos; clips of one video stay together, whatever its name."""
    z = torch.zeros(16, 3, 4, 4)
    for i in range(6):
        write_pair(tmp_path / f"scene.000{i}a.safetensors.zst", Pair(z, z.clone(), None))
    for n in range(20):
        source = Source("at 10.16.30.mov", 9 * n, 9, 0, 32, 32)
        write_pair(tmp_path / f"at 10.16.30.{n:03d}.safetensors.zst", Pair(z, z.clone(), source))
    sizes = set()
    for seed in range(20):
        ours, held_out = split(TrainConfig(str(tmp_path), seed=seed))
        assert not np.isin(ours.videos(), held_out.videos()).any()
        sizes.add(len(held_out))
    assert sizes == {1, 20}
