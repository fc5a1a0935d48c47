"""Caches load in musubi-tuner's training, and its trainers step on them."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import needs
from encoder_files import hunyuan_options, kvae_options, siglip_options
from kvae_comfyui.serving.architectures import CACHED
from kvae_comfyui.training.cli import main
from musubi_media import clip, picture, write_config
from musubi_side import datasets_of

pytest.importorskip("cv2", reason="needs cv2: install requirements-training.txt")
pytestmark = needs.musubi

HV15 = "hunyuan_video_1.5"
TRAINERS = {
    "hunyuan_video": ("hv_train_network", "HunyuanVideoNetworkTrainer"),
    HV15: ("hv_1_5_train_network", "HunyuanVideo15NetworkTrainer"),
    "kandinsky5": ("kandinsky5_train_network", "Kandinsky5NetworkTrainer"),
}


class Linear(nn.Module):
    """In the place of a transformer: a linear map of the channels, which come second, or last for Kandinsky 5."""

    patch_size, hidden_size, heads_num, rope_dim_list, visual_cond = [1, 2, 2], 16, 1, [4, 6, 6], True

    def __init__(self, channels_in, channels_out, last):
        super().__init__()
        self.map, self.last = nn.Linear(channels_in, channels_out), last

    def forward(self, *arguments, **more):
        x = arguments[0] if arguments else more["hidden_states"]
        y = self.map(x if self.last else x.movedim(1, -1))
        return y if self.last else y.movedim(-1, 1)


def write_texts(monkeypatch, dataset, stems):
    """Text caches for all media of a dataset."""
    io = needs.musubi_module(monkeypatch, "dataset.image_video_dataset")
    for stem in stems:
        item = io.ItemInfo(stem + ".mp4", "a caption", (0, 0), (0, 0))
        item.text_encoder_output_cache_path = dataset.get_text_encoder_output_cache_path(item)
        if dataset.architecture == "hv":
            io.save_text_encoder_output_cache(item, torch.randn(7, 8), torch.ones(7, dtype=torch.bool), True)
            io.save_text_encoder_output_cache(item, torch.randn(8), None, False)
        elif dataset.architecture == "hv15":
            io.save_text_encoder_output_cache_hunyuan_video_1_5(item, torch.randn(7, 8), torch.randn(3, 8))
        else:
            io.save_text_encoder_output_cache_kandinsky5(
                item, torch.randn(7, 8), torch.randn(8), torch.ones(7, dtype=torch.bool)
            )


def trainer_of(monkeypatch, architecture, i2v):
    module, name = TRAINERS[architecture]
    trainer = getattr(needs.musubi_module(monkeypatch, module), name)()
    trainer.pos_embed_cache, trainer._i2v_training = {}, i2v
    if architecture == "kandinsky5":
        trainer.task_conf = next(iter(needs.musubi_module(monkeypatch, "kandinsky5.configs").TASK_CONFIGS.values()))
        trainer._i2v_mode = "first_last"
    return trainer


def steps(trainer, architecture, batches):
    """Two steps; the losses."""
    channels = CACHED[architecture].space.channels
    inner = {"hunyuan_video": channels * (2 if trainer.i2v_training else 1)}.get(architecture, 2 * channels + 1)
    model = Linear(inner, channels, architecture == "kandinsky5")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    args = SimpleNamespace(guidance_scale=1.0, gradient_checkpointing=False)
    losses = []
    for batch in batches:
        latents = trainer.scale_shift_latents(batch["latents"]).float()
        torch.manual_seed(0)  # the same noise in every step, so that the loss must fall
        noise, t = torch.randn_like(latents), torch.full((len(latents),), 0.5)
        out = trainer.call_dit(
            args, accelerator, model, latents, batch, noise, (latents + noise) / 2, 1000 * t, torch.float32
        )
        assert out.pred.shape == out.target.shape
        loss = (out.pred - out.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("architecture", "i2v", "encoder"),
    [
        ("hunyuan_video", False, hunyuan_options),
        ("hunyuan_video", True, kvae_options),
        (HV15, False, kvae_options),
        (HV15, True, hunyuan_options),
        ("kandinsky5", True, hunyuan_options),
        ("kandinsky5", True, kvae_options),
    ],
)
def test_two_steps(architecture, i2v, encoder, tmp_path, monkeypatch):
    clip(tmp_path / "v" / "a_1.mp4", 19, 64, 96), clip(tmp_path / "v" / "b.mp4", 10, 64, 96)
    video = {"video_directory": str(tmp_path / "v"), "cache_directory": str(tmp_path / "c"), "target_frames": [9]}
    image = {"image_directory": str(tmp_path / "i"), "cache_directory": str(tmp_path / "ci")}
    with_images = not (i2v and architecture == HV15)
    if with_images:
        picture(tmp_path / "i" / "c.png", 64, 96), picture(tmp_path / "i" / "d_1.png", 300, 450)
    config = write_config(
        tmp_path / "a.json", video, *[image] * with_images,
        caption_extension=".txt", resolution=[96, 64], enable_bucket=True, batch_size=2,
    )  # fmt: skip
    more = siglip_options(tmp_path) if i2v and architecture == HV15 else []
    argv = ["cache", "--dataset-config", str(config), "--architecture", architecture, "--device", "cpu"]
    assert main([*argv, *encoder(tmp_path, architecture), *more]) == 0
    datasets = datasets_of(monkeypatch, config, architecture)
    batches = []
    for dataset, stems in zip(datasets, (["a_1", "b"], ["c", "d_1"]), strict=False):
        write_texts(monkeypatch, dataset, stems)
        dataset.prepare_for_training()
        batches += [dataset.batch_manager[i] for i in range(len(dataset))]
    space = CACHED[architecture].space
    shapes = {tuple(batch["latents"].shape) for batch in batches}
    assert shapes == {(2, space.channels, t, 64 // space.spatial_factor, 96 // space.spatial_factor)
                      for t in ([3, 1] if with_images else [3])}  # fmt: skip
    trainer = trainer_of(monkeypatch, architecture, i2v)
    first, last = steps(trainer, architecture, [batches[0], batches[0]])
    assert np.isfinite([first, last]).all() and last < first
    if with_images:
        assert np.isfinite(steps(trainer, architecture, [batches[1]])).all()
    if architecture == "kandinsky5":  # already scaled: about the spread that the model was trained on
        assert 0.2 < batches[0]["latents"].float().std() < 5
