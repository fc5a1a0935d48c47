"""vfl-generate: base and LoRA side by side, from a LoRA of any of the four formats, in diffusers' pipeline."""

import json

import av
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import needs
from command import refusal
from kvae_comfyui.adapters import LatentAdapter, latent_space, save_adapter
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.evaluate.pictures import LABEL_HEIGHT
from kvae_comfyui.training.vfl.backbone import load_backbone
from kvae_comfyui.training.vfl.base import load_pipeline
from kvae_comfyui.training.vfl.head_files import made_for, save_head
from kvae_comfyui.training.vfl.identity import Head
from kvae_comfyui.training.vfl.lora import add_lora, lora_of, lora_parameters
from kvae_comfyui.training.vfl.lora_files import FORMATS, lora_path, write_lora
from kvae_comfyui.training.vfl.tiny import save_tiny, tiny_pipeline
from vfl_characters import save_dinov3

needs.package("transformers", "requirements-vfl.txt")
needs.package("peft", "requirements-vfl.txt")
PROMPT = 'A "red" cat.'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the base, a LoRA in all formats, a DINOv3 with a head, and a picture."""
    root = tmp_path_factory.mktemp("made")
    save_tiny(root / "base")
    transformer = tiny_pipeline().transformer
    add_lora(transformer, "published", 2, 2)
    with torch.no_grad():
        for i, each in enumerate(lora_parameters(transformer).values()):
            each.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    write_lora(root / "loras", "ash", lora_of(transformer))
    save_dinov3(root / "dinov3")
    save_head(
        root / "head.safetensors", Head((32, 16, 8)), made_for(load_backbone(str(root / "dinov3"), "cpu"), {}, {})
    )
    Image.effect_mandelbrot((40, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(root / "ash.png")
    return root


def command(made, out, *more, lora="ash.comfyui.safetensors"):
    return [
        *("vfl-generate", str(made / "ash.png"), "--base", str(made / "base"), "--lora", str(made / "loras" / lora)),
        *("--prompt", PROMPT, "--output-root", str(out), "--frames", "5", "--steps", "2", "--device", "cpu", *more),
    ]  # fmt: skip


def frames(path):
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(each.to_ndarray(format="rgb24")) for each in container.decode(video=0)])


def coarse(video_THW3):
    """Means of 4x4 pixels, which H.264 hardly changes: of noise, it keeps no more."""
    return F.avg_pool2d(video_THW3.movedim(3, 1), 4)


def test_the_left_half_is_the_base_alone(made, tmp_path, capsys):
    """The pipeline as diffusers loads it, from the picture that it crops itself."""
    assert (
        main(command(made, tmp_path, "--head", str(made / "head.safetensors"), "--backbone", str(made / "dinov3"))) == 0
    )
    said = capsys.readouterr().out
    assert "format comfyui, 33 layers, rank 2" in said and "1 of 1 videos generated" in said
    shown = frames(tmp_path / "ash.mp4").float()
    pipe = load_pipeline(made / "base")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_frames": 5, "num_inference_steps": 2, "output_type": "pt"}
    with Image.open(made / "ash.png") as picture:
        expected = pipe(picture, PROMPT, generator=torch.Generator().manual_seed(0), **options).frames[0]
    expected = 255 * expected.permute(0, 2, 3, 1)
    height, width = expected.shape[1:3]
    assert shown.shape == (5, LABEL_HEIGHT + height, 2 * width, 3)
    base, ours, theirs = (coarse(each) for each in (*shown[:, LABEL_HEIGHT:].split(width, dim=2), expected))
    assert (base - theirs).abs().mean() < 5 < (ours - base).abs().mean()
    record = json.loads((tmp_path / "ash.json").read_text())["figures"]
    assert record["base_motion"] == pytest.approx(expected.round().diff(dim=0).abs().mean().item(), rel=1e-5)
    assert record["base_identity"] != record["identity"]
    page = (tmp_path / "index.html").read_text()
    assert 'src="ash.mp4"' in page and "identity, base" in page and str(made) not in page


def test_every_format_gives_the_same(made, tmp_path):
    for format in FORMATS:
        out = tmp_path / format
        assert main(command(made, out, lora=lora_path(made / "loras", "ash", format))) == 0
    found = [json.loads((tmp_path / format / "ash.json").read_text())["figures"] for format in FORMATS]
    for each in found[1:]:
        assert each["base_motion"] == found[0]["base_motion"]
        assert each["motion"] == pytest.approx(found[0]["motion"], abs=0.02) != each["base_motion"]


def test_again_it_does_nothing_and_never_overwrites(made, tmp_path, capsys):
    assert main(command(made, tmp_path)) == 0
    before = (tmp_path / "ash.mp4").stat().st_mtime_ns
    assert main(command(made, tmp_path)) == 0
    assert "0 of 1 videos generated" in capsys.readouterr().out
    assert (tmp_path / "ash.mp4").stat().st_mtime_ns == before
    assert "not made of this picture" in refusal(command(made, tmp_path, "--seed", "1"), capsys)
    (tmp_path / "ash.json").unlink()
    assert "not made of this picture" in refusal(command(made, tmp_path), capsys)


def test_kvae_decodes_in_the_place_of_the_vae(made, tmp_path, capsys):
    """An adapter with random weights: the same latents give another video, of the same size."""
    spaces = latent_space("hunyuan_video_1.5"), latent_space("kvae_3d_2.0_t4s16")
    torch.manual_seed(0)
    save_adapter(tmp_path / "h2k.safetensors", LatentAdapter(Affine(32, 64), *spaces))
    out = tmp_path / "out"
    assert main(command(made, out, "--kvae", "tiny-t4s16", "--adapter-h2k", str(tmp_path / "h2k.safetensors"))) == 0
    assert main(command(made, tmp_path / "vae")) == 0
    found, usual = (frames(path / "ash.mp4") for path in (out, tmp_path / "vae"))
    assert found.shape == usual.shape and (found.float() - usual.float()).abs().mean() > 5
    assert "--adapter-h2k is missing" in refusal(command(made, tmp_path / "x", "--kvae", "tiny"), capsys)


def test_what_cannot_be_generated_is_refused(made, tmp_path, capsys):
    assert "expected a multiple of 4 and one more" in refusal(command(made, tmp_path, "--frames", "6"), capsys)
    assert "go together" in refusal(command(made, tmp_path, "--head", "h"), capsys)
    assert "is missing" in refusal(command(made, tmp_path, "--adapter-h2k", "a"), capsys)
    base = [str(tmp_path) if part == str(made / "base") else part for part in command(made, tmp_path / "out")]
    assert "no pipeline of HunyuanVideo 1.5" in refusal(base, capsys)
    (tmp_path / "ash.png").write_bytes(b"no picture")
    broken = [
        str(tmp_path / "ash.png") if part == str(made / "ash.png") else part for part in command(made, tmp_path / "o")
    ]
    assert main(broken) == 1 and "skipped: " in capsys.readouterr().err
    twice = command(made, tmp_path / "out")
    assert "another picture is called ash" in refusal([twice[0], twice[1], *twice[1:]], capsys)
