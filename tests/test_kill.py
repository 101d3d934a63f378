"""kill.py, in small: what its program does in four settings and 50 times, here in one and twice."""

import random

import kill


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    kill.prepare_signs(tmp_path)
    words = kill.trial(tmp_path, "dropout", 2, random.Random(1), steps=100, early=0)
    assert words.startswith("2 kills") and " 0 resumed" not in words
