"""P×K batches: P identities, K different pictures of each, all equally often, as a function of seed and step."""

from collections import Counter

import pytest

import needs
from kvae_comfyui.training.errors import UserError
from kvae_comfyui.training.vfl.batches import Batches
from kvae_comfyui.training.vfl.index import Index
from kvae_comfyui.training.vfl.pictures import PictureError
from vfl_pictures import make_folder, named, pack

needs.package("webdataset", "requirements-vfl.txt")
COUNTS = (1, 2, 3, 7, 8, 9, 20)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("batches")
    make_folder(root / "in", named(COUNTS))
    assert pack(root / "in", root / "set", "--val-share", "0") == 0
    return Index(root / "set", "train")


def groups(batch, pictures):
    """The identity and the pictures of each group of K."""
    parts = [batch[i : i + pictures] for i in range(0, len(batch), pictures)]
    assert all(len(part) == pictures and len({each.identity for each in part}) == 1 for part in parts)
    return [(part[0].identity, [each.picture for each in part]) for part in parts]


def test_a_batch_holds_k_different_pictures_of_p_different_identities(index):
    batches = Batches(index, 4, 3)
    identities, pictures = Counter(), Counter()
    for step in range(300):
        batch = batches.batch(0, step, bytes)
        found = groups(batch, 3)
        assert len(found) == len({identity for identity, _ in found}) == 4
        assert all(len(set(files)) == 3 for _, files in found)
        identities.update(identity for identity, _ in found)
        pictures.update((each.identity, each.id) for each in batch)
    assert identities.keys() == {2, 3, 4, 5, 6}  # those with three pictures, equally often
    assert all(abs(n / 300 - 4 / 5) < 4 * (0.16 / 300) ** 0.5 for n in identities.values())
    assert len(pictures) == sum(COUNTS[2:])
    for (identity, _), n in pictures.items():
        assert abs(n - 300 * 0.8 * 3 / COUNTS[identity]) < 5 * (720 / COUNTS[identity]) ** 0.5 + 1


def test_a_batch_depends_on_the_seed_and_the_step_alone(index):
    ids = [[each.id for each in Batches(index, 3, 2).batch(5, step, bytes)] for step in (9, 2, 9)]
    assert ids[0] == ids[2] != ids[1]
    assert ids[0] != [each.id for each in Batches(index, 3, 2).batch(6, 9, bytes)]


def test_too_few_identities_are_refused_not_waited_for(index):
    with pytest.raises(UserError, match="3 of the 7 identities have 8 pictures or more; expected 4: ask for fewer"):
        Batches(index, 4, 8)


def test_half_of_a_batch_is_hard_to_tell_apart(index):
    """`near` names neighbours of the first identity; those with too few pictures stay out."""
    batches = Batches(index, 4, 2, near=lambda i: [0, (i - 1) % 7, (i + 1) % 7, i])
    seconds = Counter()
    for step in range(200):
        found = [identity for identity, _ in groups(batches.batch(1, step, bytes), 2)]
        allowed = {i for i in ((found[0] - 1) % 7, (found[0] + 1) % 7) if i}
        assert found[1] in allowed and len(set(found)) == 4 and 0 not in found
        seconds[found[0], found[1]] += 1
    assert len(seconds) == 10  # each pair that is possible
    lonely = Batches(index, 4, 2, near=lambda i: [0]).batch(1, 0, bytes)
    assert len({each.identity for each in lonely}) == 4


def test_a_picture_that_cannot_be_read_gives_way_to_another(index):
    bad = {index.at(2, 0, bytes).picture, index.at(3, 0, bytes).picture}

    def read(file: bytes) -> bytes:
        if file in bad:
            raise PictureError("broken")
        return file

    noted = 0
    for step in range(60):
        for sample in Batches(index, 3, 2).batch(0, step, read):
            assert sample.picture not in bad
            noted += len(sample.skipped)
    assert noted
    with pytest.raises(UserError, match="'who2': 2 of its 3 pictures can be read; expected 3"):
        for step in range(60):
            Batches(index, 3, 3).batch(0, step, read)


def test_processes_share_a_batch(index):
    """What one process reads does not depend on what the others read, or whether they can."""
    batches = Batches(index, 5, 2)
    whole = groups(batches.batch(3, 7, bytes), 2)
    assert [identity for identity, _ in whole] == batches.chosen(3, 7)
    for rank in range(3):
        assert groups(batches.batch(3, 7, bytes, slice(rank, None, 3)), 2) == whole[rank::3]


def test_sweeps_show_each_picture_once_k_at_a_time(index):
    batches = Batches(index, 3, 2)
    sweep = [groups(batches.swept(each, bytes)[0], 2) for each in batches.sweeps()]
    shown = [picture for batch in sweep for _, files in batch for picture in files]
    assert len(shown) == len(set(shown))
    assert all(2 <= len({identity for identity, _ in batch}) == len(batch) <= 3 for batch in sweep)
    times = Counter(identity for batch in sweep for identity, _ in batch)
    assert times == {1: 1, 2: 1, 3: 3, 4: 4, 5: 4, 6: 4}  # ⌊count / 2⌋, while another identity has as many left


def test_sweeps_leave_out_what_cannot_be_read(index):
    bad = index.at(6, 2, bytes).picture

    def read(file: bytes) -> bytes:
        if file == bad:
            raise PictureError("broken")
        return file

    batches = Batches(index, 3, 2)
    swept = [batches.swept(each, read) for each in batches.sweeps()]
    assert Counter(each.identity for samples, _ in swept for each in samples)[6] == 6
    assert [text for _, skipped in swept for text in skipped] == [f"{index.at(6, 2, bytes).id}: broken"]
