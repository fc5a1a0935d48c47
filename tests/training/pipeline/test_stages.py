"""The time that is left of a run: as planned, until the running stage shows its own speed."""

import pytest

from kvae_comfyui.training.runtime import stages
from kvae_comfyui.training.runtime.stages import Stages, duration, hidden, tell


def test_the_time_left_follows_the_speed_of_the_running_stage(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    with Stages({"first": 1000.0, "second": 500.0}).stage("first"):
        assert hidden() is True
        for clock[0], share in ((1.0, 0.1), (70.0, 0.11), (140.0, 0.2), (150.0, 0.5), (300.0, 0.6)):
            tell(share)
    assert hidden() is None and hidden(main=False) is True
    tell(0.5)  # outside, nobody listens
    # 0.11: by the plan, 890 + 500 s; 0.2: 0.1 in 139 s; 0.5 comes too soon after that; 0.6: 0.5 in 299 s
    assert capsys.readouterr().out.splitlines() == [
        "[1/2] first: 25 min left of the whole run",
        "[1/2] first: 11% done, 23 min left of the whole run",
        "[1/2] first: 20% done, 27 min left of the whole run",
        "[1/2] first: 60% done, 12 min left of the whole run",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (11_100, "3 h 5 min")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
