"""Progress as lines, for logs."""

from llm_surgeon import progress
from llm_surgeon.progress import LineProgress


def test_a_line_for_every_phase_and_for_a_long_one_every_half_minute(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = LineProgress()
    lines.phase("loading")
    lines.expect(150.0)
    lines.shots(2)
    for shot in (1, 2):
        lines.shot(shot)
        lines.phase("curvature [/x]")
        for done in (1, 2, 3):
            clock[0] += 20.0
            lines.step(done, 3, f"layer {done}")
    lines.shots_done()
    lines.phase("training")
    assert capsys.readouterr().err.splitlines() == [
        "surgeon: loading",
        "surgeon: shot 1 of 2: curvature [/x], about 0:02:30 left in all",
        "surgeon: shot 1 of 2: curvature [/x]: 2 of 3, about 0:00:20 left layer 2",
        "surgeon: shot 2 of 2: curvature [/x], about 0:01:30 left in all",
        "surgeon: shot 2 of 2: curvature [/x]: 2 of 3, about 0:00:20 left layer 2",
        "surgeon: training, about 0:00:30 left in all",
    ]
