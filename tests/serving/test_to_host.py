"""Frames come to the host one segment late: complete, in order, and even if the next segment fails."""

import weakref

import pytest
import torch

import needs
from kvae_comfyui.kvae.engine.tiles import Part
from kvae_comfyui.serving.host_vae import HostVAE
from kvae_comfyui.serving.to_host import PinnedCopies, one_late, to_host

SHAPE = 1, 3, 17, 32, 48


class FakeCopies:
    """Two buffers that are used in turn. A copy happens only when it is waited for."""

    def __init__(self, log):
        self.log, self.started = log, 0
        self.buffers = torch.zeros(SHAPE), torch.zeros(SHAPE)

    def start(self, x):
        number, buffer = self.started, self.buffers[self.started % 2]
        self.started += 1
        self.log.append(f"start {number}")

        def arrive():
            self.log.append(f"arrive {number}")
            return buffer.copy_(x)

        return arrive


def parts(log, count, error=None):
    """Parts 0, 1 …, each filled with its number; then the error."""
    for i in range(count):
        log.append(f"compute {i}")
        yield Part(torch.full(SHAPE, float(i)), (slice(i, i + 1),))
    if error:
        raise error


def test_a_copy_is_waited_for_after_the_next_segment_has_been_launched():
    log: list[str] = []
    found = [(part.x.mean().item(), part.where) for part in one_late(parts(log, 3), FakeCopies(log).start)]
    assert found == [(i, (slice(i, i + 1),)) for i in range(3)]
    assert log == [
        *("compute 0", "start 0", "compute 1", "start 1", "arrive 0", "compute 2", "start 2", "arrive 1", "arrive 2")
    ]
    assert list(one_late(parts(log, 0), FakeCopies(log).start)) == []
    assert [part.x.mean().item() for part in one_late(parts(log, 1), FakeCopies(log).start)] == [0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_was_computed_before_memory_ran_out_is_not_lost(count):
    found, log = [], []
    with pytest.raises(torch.OutOfMemoryError):
        for part in one_late(parts(log, count, torch.OutOfMemoryError("small card")), FakeCopies(log).start):
            found.append(part.x.mean().item())
    assert found == list(range(count))


def test_a_reader_that_stops_leaves_no_copy_behind():
    """A copy that still runs would read memory that is used for something else by then."""
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        reader = one_late(parts(log, 5), FakeCopies(log).start)
        next(reader)
        reader.throw(KeyboardInterrupt)
    assert [line for line in log if "start" in line] == ["start 0", "start 1"]
    assert [line for line in log if "arrive" in line] == ["arrive 0", "arrive 1"]


def test_no_more_than_one_part_is_held_while_the_next_is_computed():
    held: list[weakref.ref] = []

    def watched():
        for i in range(4):
            assert [ref() is not None for ref in held] == [False] * (i - 1) + [True] * (i > 0)
            x = torch.full(SHAPE, float(i))
            held.append(weakref.ref(x))
            yield Part(x, (slice(i, i + 1),))
            del x

    for part in one_late(watched(), FakeCopies([]).start):
        del part
    assert [ref() for ref in held] == [None] * 4


# ---- on a card


@needs.gpu
def test_frames_arrive_as_they_were_computed():
    device, expected = torch.device("cuda", torch.cuda.current_device()), [torch.randn(SHAPE) for _ in range(5)]

    def computed():
        for x in expected:
            last = x.to(device).contiguous(memory_format=torch.channels_last_3d)
            for _ in range(50):  # the device is behind the host
                last = last + 1 - 1
            yield Part(last, (slice(0, 1),))

    for part, x in zip(to_host(computed(), device), expected, strict=True):
        assert part.x.is_pinned()
        torch.testing.assert_close(part.x, x, rtol=0, atol=1e-4)


@needs.gpu
def test_without_pinned_memory_frames_arrive_all_the_same(monkeypatch):
    def refuse(self, size):
        raise RuntimeError("cannot pin")

    monkeypatch.setattr(PinnedCopies, "_buffer", refuse)
    device, x = torch.device("cuda", torch.cuda.current_device()), torch.randn(SHAPE)
    (part,) = to_host(iter([Part(x.to(device), (slice(0, 1),))]), device)
    assert torch.equal(part.x, x)


@needs.gpu
@pytest.mark.parametrize("way", ["decode", "stream"])
def test_pinned_memory_changes_no_frame(small_kvae, way):
    host, z = HostVAE(small_kvae.cuda()), torch.randn(2, 16, 10, 8, 8, device="cuda")
    results = []
    with torch.no_grad():
        for host.pin_memory in (True, False):
            results.append(host.decode(z) if way == "decode" else torch.cat(list(host.decode_stream(z)), dim=2))
    assert results[0].device.type == "cpu" and not results[0].is_pinned()
    assert torch.equal(*results)
