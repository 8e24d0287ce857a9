from benchmarks.speed.first_video import compare


def _run(loop: str, seconds: float, frames: str = "a") -> dict:
    return {"loop": loop, "processor_seconds": seconds, "frames": frames}


def test_medians_and_videos_of_both_loops_are_compared():
    runs = [
        _run("unrolled", 12.0),
        _run("scan", 10.0),
        _run("unrolled", 30.0),
        _run("scan", 9.0),
        _run("unrolled", 11.0),
    ]
    assert compare(runs) == (12.0 / 9.5, True)
    assert compare([*runs, _run("scan", 10.0, "b")])[1] is False
