"""kill.py, in small: what its program does in four settings and 50 times, here in one and twice."""

from conftest import BESIDE

BESIDE["kill"] = """
import random, sys, tempfile
sys.path.append("tests")
import kill

kill.FLAGS += ["--n_embd=256", "--batch_size=1", "--eval_interval=1"]      # it writes most of the time
with tempfile.TemporaryDirectory() as folder:
    kill.prepare_signs(folder)
    print(kill.trial(kill.Path(folder), "adamw", 2, random.Random(1), steps=24, early=0))
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(answer):
    words = answer("kill").strip().splitlines()[-1]
    assert words.startswith("2 kills") and " 0 resumed" not in words
