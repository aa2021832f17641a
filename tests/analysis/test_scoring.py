"""Every choice is measured once; a checkpoint remembers it for the next run, whole and of this search only."""

import json

import numpy as np
import pytest

from mptqc.analysis.scoring import Checkpoint, Scorer
from mptqc.analysis.sensitivity import Measured
from mptqc.errors import OutputError, RecipeError
from mptqc.runtime.executors import open_executor

FOUND = Measured(np.array([0.1, 1 / 3]), np.array([1e-300, 2.5]), np.array([True, False]))
KEY = ((8, 8, 3), (8, 7, 3))


def same(one, two):
    hits = one.hits is two.hits or np.array_equal(one.hits, two.hits)
    return np.array_equal(one.losses, two.losses) and np.array_equal(one.changes, two.changes) and hits


@pytest.mark.parametrize("found", [FOUND, Measured(FOUND.losses, FOUND.changes, None)])
def test_what_was_measured_is_read_back_exactly(tmp_path, found):
    checkpoint = Checkpoint(tmp_path / "search", "digest")
    assert checkpoint.read() == {}
    checkpoint.add(KEY, found)
    ((key, read),) = Checkpoint(tmp_path / "search", "digest").read().items()
    assert key == KEY
    assert same(read, found)


def test_a_line_that_was_cut_off_is_left_out_and_the_next_is_whole(tmp_path):
    path = tmp_path / "search"
    checkpoint = Checkpoint(path, "digest")
    checkpoint.read()
    checkpoint.add(KEY, FOUND)
    with path.open("a") as file:
        file.write('{"state": "88')
    resumed = Checkpoint(path, "digest")
    assert list(resumed.read()) == [KEY]
    other = (KEY[1], KEY[1])
    resumed.add(other, FOUND)
    assert list(Checkpoint(path, "digest").read()) == [KEY, other]


@pytest.mark.parametrize("content", [json.dumps({"problem": "other"}), "a letter to a friend", "[1]", "7"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "search").write_text(content + "\n")
    with pytest.raises(RecipeError, match="belongs to another search"):
        Checkpoint(tmp_path / "search", "digest").read()
    assert (tmp_path / "search").read_text() == content + "\n"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be used"):
        Checkpoint(tmp_path / "no folder" / "search", "digest").read()


def test_a_choice_is_measured_once(bench, tmp_path):
    made = bench()
    lower = (made.start[0] - 1, *made.start[1:])
    with open_executor("in-process") as place:
        score = Scorer(made.problem, place, tmp_path / "search")
        first = score(made.start, [lower, made.start, lower])
        assert score.measured == 2
        assert first[0] is first[2]
        resumed = Scorer(made.problem, place, tmp_path / "search")
        again = resumed(made.start, [lower, made.start])
    assert resumed.measured == 0
    assert all(same(one, two) for one, two in zip(first, again, strict=False))
