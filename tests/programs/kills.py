"""Two kills of a small run that writes most of the time, by kill.py."""

import random
from pathlib import Path

import kill

kill.FLAGS += ["--n_embd=256", "--batch_size=1", "--eval_interval=1"]
kill.prepare_signs(Path())
print(kill.trial(Path(), "adamw", 2, random.Random(1), steps=24, early=0))
