import io
import sys

from dit.progress import Progress


def test_progress_prints_a_line_at_most_every_five_seconds_and_at_the_end(time):
    file = io.StringIO()
    progress = Progress(10, "image", file=file)
    for seconds in [2, 1, 1, 1, 3, 0]:  # at 102, 103, 104, 105, 108, 108
        time.now += seconds
        progress.advance(1)
    time.now += 1
    progress.advance(4)
    progress.close()
    assert file.getvalue().splitlines() == [
        "image 1/10  0.5 images/s",
        "image 5/10  0.6 images/s  00:08 left",
        "image 10/10  1.1 images/s",
    ]


def test_progress_that_goes_on_does_not_count_what_was_done_before(time, capsys):
    progress = Progress(50_000, "image", done=1000)
    time.now += 2
    progress.advance(24)
    assert progress.rate == 12
    assert capsys.readouterr() == ("", "image 1024/50000  12.0 images/s\n")
    assert progress.time_left == "1:08:01"


def test_progress_over_items_counts_each():
    progress = Progress(3, "file", file=io.StringIO())
    assert list(progress.over("abc")) == ["a", "b", "c"]
    assert progress.done == 3


def test_a_terminal_shows_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(8, "step", done=3)
    progress.advance(2, "loss 0.2500")
    assert not progress.bar.disable
    assert (progress.bar.n, progress.bar.total) == (5, 8)
    assert progress.bar.postfix == "loss 0.2500"
    progress.close()
    assert "\nstep 5/8" not in capsys.readouterr().err
