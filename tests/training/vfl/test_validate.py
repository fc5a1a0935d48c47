"""Validation of a LoRA: what it says of student and base, against the same by hand; and two processes as one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import needs
from kvae_comfyui.training.vfl.conditions import conditions, encode_picture, encode_text, flow
from kvae_comfyui.training.vfl.decoders import hunyuan_decoder
from kvae_comfyui.training.vfl.lora import add_lora, base_of, lora_parameters
from kvae_comfyui.training.vfl.path import Steps, euler, noise, sigmas
from kvae_comfyui.training.vfl.step import Recipe
from kvae_comfyui.training.vfl.tiny import tiny_pipeline
from kvae_comfyui.training.vfl.train_step import said
from kvae_comfyui.training.vfl.validate import ValSample, fixed_steps, line, validate

needs.package("transformers", "requirements-vfl.txt")
needs.package("peft", "requirements-vfl.txt")


def embed(p):
    return F.normalize(F.adaptive_avg_pool2d(p, 2).flatten(1) - 0.4, dim=1)


def second(p):
    return F.adaptive_max_pool2d(p, 3).flatten(1)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def samples(pipe):
    made = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, 32, 32), generator=made, dtype=torch.uint8) for _ in range(3)]
    return [
        ValSample(
            conditions([encode_text(pipe, "A cat.")], [encode_picture(pipe, each)], "cpu", torch.float32),
            noise(0, k, (1, 32, 3, 2, 2)),
            each[None] / 255,
        )
        for k, each in enumerate(pictures)
    ]


@pytest.fixture
def setting(pipe):
    pipe = tiny_pipeline()
    add_lora(pipe.transformer, "attention", 2, 2)
    return SimpleNamespace(
        transformer=pipe.transformer,
        decode=hunyuan_decoder(pipe.vae),
        recipe=Recipe(sigmas(5, 5), Steps(), (2, 3)),
        processes=SimpleNamespace(rank=0, count=1, gather=lambda value: [value]),
        config=SimpleNamespace(decode_scale=1.0),
        embed=embed,
        second=second,
    )


def moved(setting):
    with torch.no_grad():
        for i, each in enumerate(lora_parameters(setting.transformer).values()):
            each.normal_(std=0.3, generator=torch.Generator().manual_seed(i))


def test_the_steps_are_fixed():
    """25 steps as the published settings have them: 6 and 12, the middle of 14 to 20, one of those after it."""
    assert fixed_steps(Recipe(sigmas(25, 5))).indices == (6, 12, 17, 21)
    assert fixed_steps(Recipe(sigmas(25, 5), Steps(tail=0))).indices == (6, 12, 17)
    assert fixed_steps(Recipe(sigmas(25, 5), Steps(count=0), (24, 24))).indices == (24,)


def test_a_fresh_lora_is_its_base(setting, samples):
    found = validate(setting, samples)
    assert found["distill"] == found["change"] == found["border_change"] == 0 and found["flow"] > 0
    assert found["identity"] == found["base_identity"] and found["second"] == found["base_second"]
    assert found["motion_ratio"] == 1 and "WARNING" not in line(0, found)


def by_hand(setting, sample):
    """The base's way to each step, one Euler step at a time, and the clips that both foresee there."""
    sigma, drawn = setting.recipe.sigma, fixed_steps(setting.recipe)
    x, errors, flows, clips = sample.noise, [], [], []
    for i in range(drawn.indices[-1] + 1):
        student = flow(setting.transformer, sample.given, x, sigma[i])
        with base_of(setting.transformer):
            base = flow(setting.transformer, sample.given, x, sigma[i])
        if i in drawn.indices:
            errors.append(((student - base) ** 2).mean())
            flows.append((base**2).mean())
        if i == drawn.deep:
            clips = [setting.decode(x - sigma[i] * v) for v in (student, base)]
        x = euler(x, base, sigma, i)
    return torch.stack(errors).mean(), torch.stack(flows).mean(), *clips


@torch.no_grad()
def test_every_figure_is_that_by_hand(setting, samples):
    moved(setting)
    found = validate(setting, samples[:1])
    distill, flows, y, base = by_hand(setting, samples[0])
    picture = samples[0].picture
    expected = {"distill": distill, "flow": flows, "drift": distill / flows, "change": (y - base).abs().mean()}
    for prefix, clip in (("", y), ("base_", base)):
        frames = clip[0].transpose(0, 1)[1:]
        expected[f"{prefix}identity"] = (embed(frames) @ embed(picture)[0]).mean()
        expected[f"{prefix}second"] = F.cosine_similarity(second(frames), second(picture)).mean()
        expected[f"{prefix}motion"] = (clip[:, :, 1:] - clip[:, :, :-1]).abs().mean()
    expected["identity_std"] = (embed(y[0].transpose(0, 1)[1:]) @ embed(picture)[0]).std(correction=0)
    expected["motion_ratio"] = expected["motion"] / expected["base_motion"]
    inner = (y - base).abs()[..., 4:-4, 4:-4]
    expected["border_change"] = ((y - base).abs().sum() - inner.sum()) / (y.numel() - inner.numel())
    assert found.keys() == expected.keys() and found["distill"] > 0 and found["change"] > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-4), name


def test_two_processes_find_what_one_finds_in_as_many_passes_each(setting, samples):
    """Three samples for two: the one that has one less runs another, which does not count."""
    moved(setting)
    whole, passes, found = validate(setting, samples), [], []
    for _ in range(2):  # first what each has, then with what the others have
        parts, found = [each for each in found], []
        for rank in range(2):
            calls = []
            handle = setting.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            held = []

            def gather(value, held=held, parts=parts):
                held.append(value)
                return parts or [value]

            other = SimpleNamespace(**vars(setting) | {"processes": SimpleNamespace(rank=rank, count=2, gather=gather)})
            result = validate(other, samples)
            handle.remove()
            passes.append(len(calls))
            found.append(held[0])
            assert not parts or result == whole
    assert len(set(passes)) == 1


def test_it_warns_of_stills_of_flicker_and_of_drift():
    calm = {
        **dict.fromkeys(("identity", "identity_std", "base_identity", "second", "base_second"), 0.5),
        **{"motion_ratio": 1.0, "change": 0.01, "border_change": 0.001, "drift": 0.001},
    }
    assert line(7, calm) == (
        "  step 7: identity 0.500 ± 0.500 (base 0.500), by the second judge 0.500 (0.500), motion 1.00 of the base's, "
        "change 2.55 of 255, at the border 0.26, distillation 0.100% of the flow"
    )
    assert "moves less" in line(7, calm | {"motion_ratio": 0.79}) and "flickers" in line(
        7, calm | {"motion_ratio": 1.3}
    )
    assert "off the base" in line(7, calm | {"drift": 0.0021})


def test_a_row_says_what_is_left_and_warns_of_a_large_distillation_error():
    row = {"step": 10, "drift": 0.0015, "identity": 0.4, "distill": 0.1}
    assert said(row, 60, 9990).endswith(
        "distillation 0.150% of the flow, identity loss 0.400; 60.0 s a step, 6.9 days left"
    )
    assert ", appearance loss 0.010; 60.0 s" in said(row | {"appearance": 0.01}, 60, 60)
    assert "(high: lower --identity-weight)" in said(row | {"drift": 0.0021}, 60, 60)
    assert said(row, 1, 7200).endswith("2.0 hours left") and said(row, 1, 90).endswith("1.5 minutes left")
