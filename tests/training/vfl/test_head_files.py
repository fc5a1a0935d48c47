"""Files of identity heads, published ones among them, and DINOv3's folders: read back exactly, or refused in a line."""

import json
import pickle
import zipfile
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import needs
from command import refusal
from kvae_comfyui.kvae.files import Weights
from kvae_comfyui.training.cli import main
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl.backbone import load_backbone
from kvae_comfyui.training.vfl.head_files import load_head, made_for, save_head
from kvae_comfyui.training.vfl.identity import Head
from kvae_comfyui.training.vfl.import_head import published_head
from kvae_comfyui.training.vfl.tiny import BACKBONE_WIDTH, tiny_dinov3
from vfl_characters import save_dinov3

needs.package("transformers", "requirements-vfl.txt")
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory):
    return save_dinov3(tmp_path_factory.mktemp("dinov3"))


def published(dims, layernorm: bool, dropout: float, activation: str = "gelu", seed: int = 0) -> nn.Sequential:
    """A head as the published trainer builds it: dropout takes a number only if there is any."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims)):
        layers.append(nn.Linear(before, after))
        if i < len(dims) - 2:
            layers += [nn.LayerNorm(after)] * layernorm + [ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] * (dropout > 0)
    net = nn.Sequential(*layers).eval()
    for parameter in net.parameters():  # LayerNorm starts at ones and zeros, which would hide a swap
        nn.init.normal_(parameter, std=0.3)
    return net


def publish(path, net, **config) -> None:
    """Write a head in the published layout."""
    optimiser = torch.optim.AdamW(net.parameters())
    net(torch.randn(3, net[0].in_features)).sum().backward()
    optimiser.step()
    weights = {f"net.{key}": tensor for key, tensor in net.state_dict().items()}
    content = {"step": 4000, "head_state_dict": weights, "optimizer": optimiser.state_dict(), "config": config}
    torch.save(content, path)


def importing(path, dinov3, output) -> list[str]:
    return ["vfl-import-head", "--input", str(path), "--backbone", str(dinov3), "--output", str(output)]


@pytest.mark.parametrize("layernorm", [True, False])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("dims", [(BACKBONE_WIDTH, 16, 8), (BACKBONE_WIDTH, 24, 16, 8), (BACKBONE_WIDTH, 8)])
def test_a_published_head_gives_the_same_embeddings(layernorm, dropout, dims, tmp_path, dinov3, capsys):
    net = published(dims, layernorm, dropout)
    publish(tmp_path / "head.pt", net, dropout=dropout, use_layernorm=layernorm, proj_dims=list(dims[1:]))
    assert main(importing(tmp_path / "head.pt", dinov3, tmp_path / "head.safetensors")) == 0
    assert " → ".join(map(str, dims)) in capsys.readouterr().out
    head, made = load_head(tmp_path / "head.safetensors", load_backbone(str(dinov3), "cpu"))
    x = torch.randn(5, dims[0])
    with torch.no_grad():
        assert torch.equal(head(x), nn.functional.normalize(net(x), dim=-1))
    assert (made.width, made.side, made.training) == (BACKBONE_WIDTH, 32, {"imported": "head.pt"})


def test_the_activation_is_that_of_the_config(tmp_path):
    net = published((32, 16, 8), True, 0.1, "relu")
    publish(tmp_path / "head.pt", net, activation="relu")
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(published_head(tmp_path / "head.pt")(x), nn.functional.normalize(net(x), dim=-1))
    publish(tmp_path / "head.pt", net, activation="swish")
    with pytest.raises(UserError, match="activation 'swish'; expected gelu, relu"):
        published_head(tmp_path / "head.pt")


def test_weights_alone_are_a_head_too(tmp_path):
    net = published((32, 16, 8), True, 0.1)
    torch.save({f"net.{key}": tensor for key, tensor in net.state_dict().items()}, tmp_path / "head.pt")
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(published_head(tmp_path / "head.pt")(x), nn.functional.normalize(net(x), dim=-1))


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def raw(path, content: bytes) -> None:
    path.write_bytes(content)


def compressed(path) -> None:
    """A file of a few bytes that would fill the memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("head/data.pkl", bytes(10_000_000))


def weights(path, **tensors) -> None:
    torch.save({"head_state_dict": {key.replace("_", "."): tensor for key, tensor in tensors.items()}}, path)


BAD = {
    "no zip": (lambda path: raw(path, b"text"), "not a file that torch.save writes"),
    "a plain pickle": (lambda path: raw(path, pickle.dumps(Evil())), "not a file that torch.save writes"),
    "code": (lambda path: torch.save({"head_state_dict": Evil()}, path), "so it was not opened"),
    "compressed": (compressed, "its parts are compressed"),
    "a list": (lambda path: torch.save([1], path), "a list; expected head_state_dict"),
    "empty": (lambda path: torch.save({"head_state_dict": {}}, path), "no weights in it"),
    "no tensor": (lambda path: torch.save({"head_state_dict": {"net.0.weight": 3}}, path), "is a int"),
    "other keys": (lambda path: weights(path, blocks=torch.zeros(2, 2)), "expected keys like net.0.weight"),
    "whole numbers": (lambda path: weights(path, net_0_weight=torch.zeros(2, 2, dtype=torch.int64)), "expected floats"),
    "a huge view": (
        lambda path: weights(path, net_0_weight=torch.zeros(1).expand(10**6, 10**6)),
        "1,000,000,000,000 values, of which few are in the file",
    ),
    "a gap": (
        lambda path: weights(
            path, net_0_weight=torch.zeros(10**6, 1), net_0_bias=torch.zeros(10**6),
            net_2_weight=torch.zeros(1, 10**5), net_2_bias=torch.zeros(1),
        ),
        "in a row",
    ),
    "no bias": (lambda path: weights(path, net_0_weight=torch.zeros(8, 32)), "with biases"),
    "no matrix": (lambda path: weights(path, net_0_weight=torch.zeros(8)), "no matrix in it"),
    "not finite": (
        lambda path: weights(path, net_0_weight=torch.full((8, 32), torch.nan), net_0_bias=torch.zeros(8)),
        "not finite",
    ),
    "another width": (
        lambda path: weights(path, net_0_weight=torch.zeros(8, 768), net_0_bias=torch.zeros(8)),
        "a head for 768 features, as of DINOv3 ViT-B",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_head_is_refused_and_no_code_runs(kind, tmp_path, dinov3, capsys):
    make, words = BAD[kind]
    make(tmp_path / "head.pt")
    err = refusal(importing(tmp_path / "head.pt", dinov3, tmp_path / "head.safetensors"), capsys)
    assert words in err and "head.pt" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.pt"]


def test_a_file_too_large_is_refused_before_it_is_opened(tmp_path, dinov3, capsys):
    with (tmp_path / "head.pt").open("wb") as file:
        file.truncate(2**31)
    err = refusal(importing(tmp_path / "head.pt", dinov3, tmp_path / "head.safetensors"), capsys)
    assert "2,147,483,648 bytes; expected a head" in err


def test_the_output_must_be_another_file_and_safetensors(tmp_path, dinov3, capsys):
    publish(tmp_path / "head.pt", published((32, 16, 8), True, 0.1))
    for output, words in (("head.pt", "ends in .safetensors"), ("x.pt", "ends in .safetensors")):
        assert words in refusal(importing(tmp_path / "head.pt", dinov3, tmp_path / output), capsys)
    assert "no such file" in refusal(importing(tmp_path / "x", dinov3, tmp_path / "h.safetensors"), capsys)


@pytest.fixture
def saved(tmp_path, dinov3):
    head = Head((BACKBONE_WIDTH, 16, 8), dropout=0.1).eval()
    path = tmp_path / "head.safetensors"
    save_head(path, head, made_for(load_backbone(str(dinov3), "cpu"), {"gap": 0.5}, {"steps": 3}))
    return path, head


def test_a_head_survives_its_file(saved, dinov3):
    path, head = saved
    read, made = load_head(path, load_backbone(str(dinov3), "cpu"))
    assert read.state_dict().keys() == head.state_dict().keys() == load_file(path).keys()
    assert all(torch.equal(tensor, head.state_dict()[key]) for key, tensor in read.state_dict().items())
    assert not read.training and (made.metrics, made.training) == ({"gap": 0.5}, {"steps": 3})
    assert made.backbone == dinov3.name  # a path would tell about the machine


def test_a_head_of_one_layer_survives_its_file(tmp_path, dinov3):
    """It has no place for the LayerNorm that it was asked to have."""
    backbone, head = load_backbone(str(dinov3), "cpu"), Head((BACKBONE_WIDTH, 8), layernorm=True)
    save_head(tmp_path / "head.safetensors", head, made_for(backbone, {}, {}))
    x = torch.randn(3, BACKBONE_WIDTH)
    assert torch.equal(load_head(tmp_path / "head.safetensors", backbone)[0](x), head(x))


def test_a_head_is_refused_on_another_backbone(saved, tmp_path):
    path, _ = saved
    other = load_backbone(str(save_dinov3(tmp_path / "other", seed=1)), "cpu")
    with pytest.raises(UserError, match="made for .* has other weights"):
        load_head(path, other)
    other.width = 768
    with pytest.raises(UserError, match="a head for 32 features; .* gives 768"):
        load_head(path, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: m.clear(), "not an identity head"),
        (lambda t, m: m.pop("head"), "damaged identity head"),
        (lambda t, m: m.update(head="[1]"), "damaged identity head"),
        (lambda t, m: m.update(backbone=json.dumps({"backbone": "x"})), "damaged identity head"),
        (lambda t, m: m.update(head=m["head"].replace("16", "17")), "in the metadata"),
        (lambda t, m: m.update(head=m["head"].replace("gelu", "exec")), "activation 'exec'"),
        (lambda t, m: t.pop("net.0.bias"), "with biases"),
        (lambda t, m: t.update({"net.0.weight": torch.zeros(16, 31)}), "damaged identity head"),
    ],
)
def test_a_damaged_head_is_an_error_of_one_line(change, words, saved):
    path, _ = saved
    tensors, metadata = load_file(path), dict(Weights(path).metadata)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=words):
        load_head(path)


def test_dinov3_is_read_from_its_folder(dinov3):
    backbone, p = load_backbone(str(dinov3), "cpu"), torch.rand(2, 3, 32, 32)
    other = load_backbone(str(dinov3), "cpu")
    assert backbone.digest == other.digest and len(backbone.digest) == 64
    with torch.no_grad():
        assert torch.equal(backbone(p), other(p))
    assert all(torch.equal(a, b) for a, b in zip(backbone.model.parameters(), tiny_dinov3().parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
        (lambda d: (d / "config.json").write_text("["), "not a config of transformers"),
        (lambda d: (d / "config.json").write_text('{"model_type": "dinov3_convnext"}'), "a model of type 'dinov3_conv"),
        (lambda d: (d / "model.safetensors").unlink(), "not a DINOv3 ViT that can be read"),
        (lambda d: (d / "model.safetensors").write_bytes(b"short"), "not a DINOv3 ViT that can be read"),
        (lambda d: save_file({"x": torch.zeros(1)}, d / "model.safetensors"), "in its weights"),
    ],
)
def test_what_is_no_dinov3_is_refused_in_a_line(change, words, tmp_path, capsys):
    """transformers itself leaves missing weights random."""
    folder = save_dinov3(tmp_path / "dinov3")
    change(folder)
    publish(tmp_path / "head.pt", published((32, 8), True, 0.1))
    err = refusal(importing(tmp_path / "head.pt", folder, tmp_path / "head.safetensors"), capsys)
    assert words in err and "no such file" not in err.replace(words, "")


def test_a_backbone_that_is_not_there_is_refused_without_the_hub(tmp_path):
    with pytest.raises(UserError, match="no such folder; expected a folder of DINOv3, or a hub id"):
        load_backbone(str(tmp_path / "none"), "cpu")
