"""Weights of a VAE are recognised and named, and a latent is refused only where it certainly is of other weights."""

import pytest
import torch

from kvae_comfyui.adapters.adapter import LatentAdapter
from kvae_comfyui.adapters.files import load_adapter
from kvae_comfyui.adapters.hybrid import HybridVAE
from kvae_comfyui.adapters.networks import Affine
from kvae_comfyui.adapters.spaces import SPACES
from kvae_comfyui.adapters.weights import KNOWN, VAEWeights, check_latent_weights, in_words, known_name
from kvae_comfyui.kvae import KVAE, load_kvae
from kvae_comfyui.kvae.signature import UNRELATED, same_weights, signature, unrelated_weights
from kvae_comfyui.training.vaes import (
    INCLUDED_ADAPTERS,
    TINY,
    TINY_ADAPTERS,
    load_hunyuan_vae,
    load_kvae_for_training,
)

H, K = SPACES["hunyuan_video"], SPACES["kvae_3d_1.0"]
ONE, OTHER = (VAEWeights("", tuple(signature)) for signature in torch.randn(2, 64).tolist())


@pytest.fixture(scope="module")
def tiny():
    return load_kvae(TINY["kvae"])


def trained_further(kvae: KVAE, part: str) -> KVAE:
    """A copy in which the encoder or the decoder has other weights."""
    other = KVAE(kvae.config).eval()
    kept = {key: value for key, value in kvae.state_dict().items() if not key.startswith(part)}
    other.load_state_dict(other.state_dict() | kept)
    return other


def test_the_tiny_vaes_have_names_by_their_hash_and_by_their_signature():
    names = []
    for name, path in TINY.items():
        vae = (load_kvae_for_training if name.startswith("kvae") else load_hunyuan_vae)(str(path), "cpu")
        names.append(known_name(VAEWeights(vae.digest)))
        assert known_name(VAEWeights("", vae.signature)) == names[-1] != ""
    assert sorted(names) == sorted(each.name for each in KNOWN)
    for path in (path for each in INCLUDED_ADAPTERS.values() for path in each.values()):
        assert all(known_name(each) for each in load_adapter(path).weights.values())
    rounded = signature(load_kvae(TINY["kvae"], torch.bfloat16).state_dict())
    assert known_name(VAEWeights("", rounded)) == "this project's tiny KVAE"
    assert known_name(ONE) == known_name(VAEWeights("ab")) == known_name(VAEWeights()) == ""


def test_weights_are_named_as_exactly_as_they_are_known():
    assert in_words("kvae_3d_1.0", VAEWeights(KNOWN[1].sha256)) == "this project's tiny KVAE (kvae_3d_1.0)"
    assert in_words("kvae_3d_1.0", VAEWeights("0123456789abcdef")) == "the kvae_3d_1.0 VAE with sha256 0123456789ab…"
    words = in_words("kvae_3d_1.0", VAEWeights("", (0.25, -1.5, 3e-5, 4.0)))
    assert words == "the kvae_3d_1.0 VAE whose signature begins 0.25, -1.5, 3e-05"
    assert in_words("kvae_3d_1.0", VAEWeights()) == "a kvae_3d_1.0 VAE of unknown weights"


def test_a_latent_of_other_weights_is_refused_in_one_line_that_names_both():
    words = "a latent of this project's tiny KVAE .*; expected one of the kvae_3d_1.0 VAE whose signature begins"
    with pytest.raises(ValueError, match=words) as caught:
        check_latent_weights("kvae_3d_1.0", VAEWeights(KNOWN[1].sha256, ONE.signature), OTHER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("made", "read"),
    [(None, ONE), (ONE, None), (VAEWeights("ab"), ONE), (VAEWeights("ab"), VAEWeights("cd")), (ONE, ONE),
     (VAEWeights("ab", ONE.signature), VAEWeights("ab", OTHER.signature))],
)  # fmt: skip
def test_what_is_not_certain_passes(made, read):
    check_latent_weights("kvae_3d_1.0", made, read)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_latents_pass_between_vaes_that_share_a_half_but_no_adapter_does(tiny, part):
    known, further = signature(tiny.state_dict()), signature(trained_further(tiny, part).state_dict())
    assert not unrelated_weights(known, further) and not same_weights(known, further)
    assert unrelated_weights(known, signature(KVAE(tiny.config).state_dict()))


def test_separate_weights_never_agree_as_much_as_those_that_share_a_half():
    """Two normal values of one deviation are within 1/16 of the larger with a probability of about 2 %."""
    one, other = torch.randn(2, 64, 10_000, generator=torch.Generator().manual_seed(0)).unbind()
    agree = ((one - other).abs() <= torch.maximum(one.abs(), other.abs()) / 16).float().mean(0)
    assert 0.018 < agree.mean() < 0.024 and agree.max() < 0.75 * UNRELATED


def test_latents_through_an_adapter_are_of_the_foreign_vae_that_it_was_made_for(tiny):
    h2k, k2h = (load_adapter(path) for path in TINY_ADAPTERS.values())
    vae, native = HybridVAE(tiny, h2k, k2h), HybridVAE(tiny)
    assert vae.weights_read == vae.weights_written == h2k.weights["hunyuan_video"]
    assert native.weights_read == native.weights_written == VAEWeights("", h2k.weights["kvae_3d_1.0"].signature)
    nameless = HybridVAE(tiny, LatentAdapter(Affine(16, 16), H, K), k2h)
    assert (nameless.weights_read, nameless.weights_written) == (None, h2k.weights["hunyuan_video"])
    assert HybridVAE(tiny, encode_adapter=k2h).weights_read is None
