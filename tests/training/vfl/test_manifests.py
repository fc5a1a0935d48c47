"""Manifests and identities of a data set of pictures."""

import pytest

from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl.shards import identity_of, next_number, read_manifest, shard_path, write_manifest


def test_a_manifest_comes_back(tmp_path):
    counts = {"ash": 3, 'a "b", c': 1, "é\nü": 12}
    write_manifest(tmp_path / "m.csv", "identity", counts)
    manifest = read_manifest(tmp_path / "m.csv")
    assert manifest.counts == counts and list(manifest.counts) == sorted(counts)
    assert (tmp_path / "m.csv").read_text(encoding="utf-8").startswith("identity,count\n")


def test_columns_that_users_add_stay(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("line,identity,count\r\nfire,Flareon ,4\r\nwater,vaporeon,2\r\n")
    assert read_manifest(path).columns == {"line": ["fire", "water"]}
    write_manifest(path, "identity", {"vaporeon": 3, "eevee": 1, "flareon": 4})
    manifest = read_manifest(path)
    assert manifest.counts == {"eevee": 1, "flareon": 4, "vaporeon": 3}
    assert manifest.columns == {"line": ["", "fire", "water"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its columns are none; expected identity, count"),
        ("name,count\na,1\n", "its columns are name, count"),
        ("identity,count,count\na,1,1\n", "its columns are"),
        ("identity,count\n", "it lists no identity"),
        ("identity,count\na,1,2\n", "a row of 3 columns: a,1,2"),
        ("identity,count\na,0\n", "a count of '0'"),
        ("identity,count\na,-3\n", "a count of '-3'"),
        ("identity,count\na,1e9\n", "a count of '1e9'"),
        ("identity,count\na,²\n", "a count of '²'"),
        ("identity,count\na,1\nA ,2\n", "an identity has two rows"),
        ("identity,count\n ,1\n", "an identity named ''"),
        ("identity,count\n" + "x" * 200_000 + ",1\n", "field larger than field limit"),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path, text, words):
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "m.csv")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_manifest_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such manifest; write it by `python -m training vfl-pack"):
        read_manifest(tmp_path / "m.csv")


def test_identities_are_texts_in_lower_case_or_whole_numbers():
    assert [identity_of({"id": value}, "id") for value in (" Pikachu\n", "25", 25, -1)] == ["pikachu", "25", "25", "-1"]


@pytest.mark.parametrize("about", [{}, {"id": None}, {"id": True}, {"id": 2.0}, {"id": ["a"]}, {"ID": "a"}])
def test_anything_else_is_no_identity(about):
    with pytest.raises(ValueError, match="no identity under 'id'.*name the right one by --identity-key"):
        identity_of(about, "id")


@pytest.mark.parametrize("text", ["", "  ", "x" * 1001, "caf\udce9"])
def test_a_text_may_be_no_name(text):
    with pytest.raises(ValueError, match="an identity named"):
        identity_of({"id": text}, "id")


def test_shards_are_numbered_on(tmp_path):
    assert next_number(tmp_path, "val") == 0
    for name in ("val-000003.tar", "val-x.tar", "val-000002.tar"):
        path = shard_path(tmp_path, "val", 0).with_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert shard_path(tmp_path, "val", next_number(tmp_path, "val")).name == "val-000004.tar"
