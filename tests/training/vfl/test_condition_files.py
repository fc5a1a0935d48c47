"""The cache of texts and pictures: what it gives back, and what it does not take for the same."""

import copy

import pytest
import torch

import needs
from kvae_comfyui.kvae import WeightsError
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl.condition_files import CacheInfo, begin_cache, digest_of, keep, open_cache
from kvae_comfyui.training.vfl.conditions import Picture, Text
from kvae_comfyui.training.vfl.tiny import tiny_pipeline

needs.package("transformers", "requirements-vfl.txt")
INFO = CacheInfo("a base", "0123456789abcdef" * 4, 640)
TEXT = Text(torch.randn(5, 16).bfloat16(), torch.zeros(0, 24).bfloat16())
PICTURE = Picture(torch.randn(32, 1, 2, 3), torch.randn(4, 20).bfloat16())


@pytest.fixture
def cache(tmp_path):
    return begin_cache(tmp_path, INFO)


def test_a_cache_gives_back_what_it_was_given(cache, tmp_path):
    keep(cache.text_path("a cat"), TEXT)
    keep(cache.picture_path(b"file", (0, 0, 8, 8), (32, 48)), PICTURE)
    again = open_cache(tmp_path)
    assert again.info == INFO
    found = again.text("a cat"), again.picture(b"file", (0, 0, 8, 8), (32, 48))
    for one, other in zip(found, (TEXT, PICTURE), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def test_whatever_an_entry_was_made_of_is_in_its_name(cache, tmp_path):
    others = begin_cache(tmp_path, CacheInfo("a base", "f" * 64, 640))
    paths = [cache.text_path("a cat"), cache.text_path("a cat "), others.text_path("a cat")]
    paths += [others.picture_path(b"file", None, (32, 48)), cache.picture_path(b"file", None, (32, 48))]
    paths += [cache.picture_path(b"file", None, (48, 32)), cache.picture_path(b"file", (0, 0, 8, 8), (32, 48))]
    assert len({*paths, cache.picture_path(b"other", None, (32, 48))}) == 8


def test_what_is_not_there_is_said(cache, tmp_path):
    with pytest.raises(UserError, match="the prompt 'a dog' is not in the cache .*; run vfl-cache again"):
        cache.text("a dog")
    with pytest.raises(UserError, match="a picture is not in the cache"):
        cache.picture(b"file", None, (32, 48))
    keep(cache.text_path("a dog"), PICTURE)
    with pytest.raises(UserError, match="it holds latent, states; delete it"):
        cache.text("a dog")
    cache.text_path("a dog").write_bytes(b"cut")
    with pytest.raises(WeightsError, match="cut short"):
        cache.text("a dog")
    (tmp_path / "cache.json").write_text('{"base": 1}')
    with pytest.raises(UserError, match="cache.json: not a cache of conditions"):
        open_cache(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        open_cache(tmp_path / "none")


def test_encoders_that_differ_have_another_digest():
    pipe = tiny_pipeline()
    digest = digest_of(pipe)
    assert digest == digest_of(tiny_pipeline()) != digest_of(tiny_pipeline(seed=1))
    pipe.system_message += " "
    assert digest_of(pipe) != digest
    pipe.system_message = pipe.system_message[:-1]
    encoder = pipe.image_encoder
    pipe.image_encoder = copy.deepcopy(encoder).to(torch.bfloat16)
    assert digest_of(pipe) != digest
    pipe.image_encoder = encoder
    assert digest_of(pipe) == digest
