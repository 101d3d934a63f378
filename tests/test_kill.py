"""kill.py, in small: what its program does in four settings and 50 times, here in one and twice."""

import random

import kill


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """It writes most of the time, so that a kill is likely to find it at that."""
    monkeypatch.setattr(kill, "FLAGS", [*kill.FLAGS, "--n_embd=256", "--batch_size=1", "--eval_interval=1"])
    kill.prepare_signs(tmp_path)
    words = kill.trial(tmp_path, "adamw", 2, random.Random(1), steps=24, early=0)
    assert words.startswith("2 kills") and " 0 resumed" not in words
