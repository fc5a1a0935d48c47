"""Files that are not videos, and videos with unusual names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import needs
from bad_rows import EXTRACT, RECONSTRUCT, Plant, Row, check, make_job

pytestmark = needs.posix
job = pytest.fixture(scope="module")(make_job)


def videos(*names: str, content: bytes | None = None) -> Plant:
    """A folder of files with these names: copies of a good video, or this content."""

    def plant(d: Path, job: Path) -> None:
        for name in names:
            path = d / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content or (job / "videos" / "v_Wave_g01_c01.mp4").read_bytes())

    return plant


def odd_video_folders(d: Path, job: Path) -> None:
    videos("a.mp4")(d, job)
    os.mkfifo(d / "videos" / "b.mp4")
    (d / "videos" / "c.mp4").symlink_to("absent")
    (d / "videos" / "d.mp4").mkdir()
    (d / "videos" / "e.mp4").symlink_to(d / "videos" / "e.mp4")


def listed(content: bytes) -> Plant:
    def plant(d: Path, job: Path) -> None:
        videos("a.mp4")(d, job)
        (d / "videos" / "trainlist01.txt").write_bytes(content)

    return plant


MY_VIDEOS = EXTRACT + " --videos-root {d}/videos"
VIDEOS = [
    Row(MY_VIDEOS, "", videos("a.mp4", "n" * 246 + ".mp4"), code=(0, 1)),
    Row(MY_VIDEOS, "", videos("caf\udce9.mp4"), code=0),
    Row(MY_VIDEOS, "", videos("a\nb.mp4", " .mp4", "-x.mp4", "%s.mp4"), code=0),
    Row(MY_VIDEOS, "none of the 1 videos", videos("caf\udce9.mp4", content=b"no video")),
    Row(MY_VIDEOS, "none of the 1 videos", videos("a\nb.mp4", content=b"no video")),
    Row(MY_VIDEOS, "", odd_video_folders, code=(0, 1)),
    *(Row(MY_VIDEOS + " --split train", "", listed(content)) for content in (b"\xff\xfe", b"", b"b.avi 1\n", b"\n \n")),
    Row(RECONSTRUCT + " --video-path {d}/videos/a.mp4", "", videos("a.mp4", content=b"\x00" * 4096)),
    Row(RECONSTRUCT + " --video-path {d}/videos/a.m3u8", "", videos("a.m3u8", content=b"#EXTM3U\n/etc/passwd\n")),
]  # fmt: skip


@pytest.mark.parametrize("row", VIDEOS, ids=Row.name)
def test_videos_that_cannot_be_read_are_reported(row, job, tmp_path, capsys):
    check(row, tmp_path, job, capsys)
