"""Bad latents, clips, settings and file names are refused by the nodes, in one sentence and before any work."""

import os

import pytest
import torch

from kvae_comfyui.serving.latent_writers import save_latent
from kvae_comfyui.serving.sample_clip import sample_clip

from .conftest import NATIVE, with_hidden


def test_a_latent_of_another_space_is_refused(run, load):
    (latent,) = run("KVAEEncode", pixels=sample_clip(1, 32, 32), vae=load(latents=NATIVE))
    with pytest.raises(ValueError, match="a latent of kvae_3d_1.0; expected a hunyuan_video latent"):
        run("KVAEDecode", samples=latent, vae=load(), scaling="raw", memory_gb=0.0)


def test_a_stock_vae_is_refused(run):
    stock = type("Other", (), {"first_stage_model": torch.nn.Identity()})()
    with pytest.raises(ValueError, match="This VAE is a Identity; expected one from Load KVAE"):
        run("KVAEDecode", samples={"samples": torch.zeros(1, 16, 1, 4, 4)}, vae=stock, scaling="raw", memory_gb=0.0)
    with pytest.raises(ValueError, match="expected one from Load KVAE"):
        run("KVAEEncode", pixels=sample_clip(1, 32, 32), vae=stock)


def test_bad_clips_are_refused(run, load):
    vae = load()
    with pytest.raises(ValueError, match="at least one frame"):
        run("KVAEEncode", pixels=torch.zeros(0, 32, 32, 3), vae=vae)
    for node in ("KVAEEncode", "VAEEncode"):
        with pytest.raises(ValueError, match="These pixels are 32 x 5; expected at least 8 x 8"):
            run(node, pixels=torch.zeros(1, 5, 32, 3), vae=vae)


BAD_LATENTS = {
    "None": (None, "This is a NoneType without samples"),
    "a list": ([1], "This is a list without samples"),
    "no samples": ({}, "This is a dict without samples"),
    "samples None": ({"samples": None}, "This latent is a NoneType"),
    "samples a list": ({"samples": [[1.0]]}, "This latent is a list"),
    "numpy": ({"samples": torch.zeros(1, 16, 1, 4, 4).numpy()}, "This latent is a ndarray"),
    "fp8": ({"samples": torch.zeros(1, 16, 1, 4, 4).to(torch.float8_e4m3fn)}, "This latent is of float8_e4m3fn"),
    "sparse": ({"samples": torch.ones(1, 16, 1, 4, 4).to_sparse()}, "This latent is sparse_coo"),
    "meta": ({"samples": torch.zeros(1, 16, 1, 4, 4, device="meta")}, "on the meta device"),
    "int8": ({"samples": torch.zeros(1, 16, 1, 4, 4, dtype=torch.int8)}, "This latent is of int8"),
    "bool": ({"samples": torch.zeros(1, 16, 1, 4, 4, dtype=torch.bool)}, "This latent is of bool"),
    "complex": ({"samples": torch.zeros(1, 16, 1, 4, 4, dtype=torch.complex64)}, "This latent is of complex64"),
    "NaN": ({"samples": torch.full((1, 16, 1, 4, 4), torch.nan)}, "256 of 256 values of this latent are NaN"),
    "frames in words": ({"samples": torch.zeros(1, 16, 1, 4, 4), "kvae_frames": "one"}, "kvae_frames of this latent"),
    "a space in numbers": ({"samples": torch.zeros(1, 16, 1, 4, 4), "kvae_space": 5}, "kvae_space of this latent is 5"),
}


HARMLESS = {  # entries that a node does not read, or that it reports
    "KVAEDecode": (),
    "KVAEConvertLatent": ("frames in words",),
    "KVAEInspectLatent": ("frames in words", "NaN"),
    "KVAESaveLatent": (),
}


REFUSED = [(node, name) for node, harmless in HARMLESS.items() for name in BAD_LATENTS if name not in harmless]


@pytest.mark.parametrize(("node", "name"), REFUSED)
def test_a_bad_latent_is_refused_in_one_sentence(run, load, comfy, base, node, name):
    latent, words = BAD_LATENTS[name]
    with pytest.raises(ValueError, match=words) as caught:
        if node == "KVAEDecode":
            run(node, samples=latent, vae=load(), scaling="raw", memory_gb=0.0)
        elif node == "KVAEConvertLatent":
            run(node, samples=latent, adapter=run("KVAELoadAdapter", adapter_name="h2k.safetensors")[0])
        elif node == "KVAESaveLatent":
            with_hidden(comfy.classes[node]).execute(samples=latent, filename_prefix="bad/KVAE")
        else:
            run(node, samples=latent)
    assert "\n" not in str(caught.value)
    assert not list((base / "output").glob("bad/*"))


@pytest.mark.parametrize("scaling", ["raw", "scaled"])
def test_a_nan_in_the_second_clip_is_refused_before_the_first_is_decoded(run, load, scaling):
    """VAEDecode refuses too, after KVAEDecode has used the same VAE: each checks the latent itself."""
    vae, z, seen = load(), torch.randn(2, 16, 2, 4, 4), []
    vae.first_stage_model.on_progress = lambda *done: seen.append(done)
    run("KVAEDecode", samples={"samples": z}, vae=vae, scaling=scaling, memory_gb=0.0)
    assert seen == [(0, 4), (2, 4), (4, 4)]
    z[1, 3, 1, 2, 2] = torch.nan
    for node, settings in (("KVAEDecode", {"scaling": scaling, "memory_gb": 0.0}), ("VAEDecode", {})):
        with pytest.raises(ValueError, match="1 of 1024 values of this latent are NaN"):
            run(node, samples={"samples": z}, vae=vae, **settings)
    assert len(seen) == 3


def test_invalid_settings_are_refused(run, load):
    latent, vae = {"samples": torch.zeros(1, 16, 1, 4, 4)}, load()
    with pytest.raises(ValueError, match="scaling is 'other'; expected raw or scaled"):
        run("KVAEDecode", samples=latent, vae=vae, scaling="other", memory_gb=0.0)
    for bad in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match="memory_gb is .*; expected a number of GB"):
            run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=bad)
        with pytest.raises(ValueError, match="memory_gb is .*; expected a number of GB"):
            load(memory_gb=bad)
    for wrong in ({"latents": "native"}, {"dtype": "fp8"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is '.*'; expected one of "):
            load(**wrong)
    with pytest.raises(ValueError, match="This adapter is a NoneType; expected one from Load Latent Adapter"):
        run("KVAEConvertLatent", samples=latent, adapter=None)


def test_bad_pixels_and_too_many_pixels_are_refused_before_any_work(run, load):
    clip, vae = sample_clip(5, 32, 32), load()
    clip[2, 3, 4, 1] = torch.nan
    for node in ("KVAEEncode", "VAEEncode"):
        with pytest.raises(ValueError, match="1 of 15360 values of these pixels are NaN or infinite"):
            run(node, pixels=clip, vae=vae)
    for bad, words in ((None, "a NoneType"), ([1.0], "a list"), ((clip * 255).byte(), "of uint8")):
        with pytest.raises(ValueError, match=f"These pixels are {words}"):
            run("KVAEEncode", pixels=bad, vae=vae)
    huge = torch.zeros(1)
    with pytest.raises(MemoryError, match="There is no memory for 120,000,000 GB of pixels"):
        run("KVAEEncode", pixels=huge.expand(1000, 10**5, 10**8, 3), vae=vae)
    latent = {"samples": huge.expand(1, 16, 1, 12_500, 12_500_000)}
    with pytest.raises(MemoryError, match="There is no memory for 120,000 GB of frames, 1 x 1 of 100000000x100000"):
        run("KVAEDecode", samples=latent, vae=vae, scaling="raw", memory_gb=0.0)
    with pytest.raises(MemoryError, match="There is no memory for 120,000 GB of frames"):
        run("KVAESampleClip", width=10**8, height=10**5, length=1)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("x" * 5000, "a part of over 200 bytes"),
        ("a\0b", "not a name that a file can have"),
        ("deep/" + "й" * 120, "over 200"),
    ],
    ids=["long", "NUL", "long in UTF-8"],
)
def test_a_prefix_that_is_not_a_file_name_leaves_nothing(comfy, base, prefix, words):
    before = sorted((base / "output").rglob("*"))
    with pytest.raises(ValueError, match=words):
        with_hidden(comfy.classes["KVAESaveLatent"]).execute(
            samples={"samples": torch.zeros(1, 16, 1, 4, 4)}, filename_prefix=prefix
        )
    assert sorted((base / "output").rglob("*")) == before


@pytest.fixture
def elsewhere(base, tmp_path):
    """Names that would lead to a good latent file outside ComfyUI's folders, and names that are not of a file."""
    path = tmp_path / "secret.latent"
    save_latent(path, torch.zeros(1, 16, 1, 4, 4), None, None, {})
    link = base / "input" / "link.latent"
    link.symlink_to(path)
    up = os.path.relpath(path, base / "input")
    yield [
        str(path),
        up,
        f"{os.path.relpath(path, base / 'output')} [output]",
        "link.latent",
        "a\0b",
        "",
        ".",
        "[output]",
    ]
    link.unlink()


def test_latents_are_read_from_comfyuis_folders_alone(run, comfy, elsewhere):
    """The validation of a prompt and its run refuse all other files in the same words, whether or not they exist."""
    node = comfy.classes["KVAELoadLatent"]
    for name in elsewhere:
        with pytest.raises(ValueError, match="no such latent file. Put it into ComfyUI's input folder"):
            run("KVAELoadLatent", file=name, scaling="auto")
        assert node.validate_inputs(name) == node.validate_inputs("absent.latent").replace("absent.latent", name)
    assert not set(elsewhere) & set(node.define_schema().inputs[0].options)
    for name in (5, ["1"]):
        assert "no such latent file" in node.validate_inputs(name)
