"""Trains a small model, and says whether that has imported PyTorch's compiler."""

import sys
from pathlib import Path

from conftest import TEXT, TINY, call

Path("tiny.txt").write_text(TEXT)
assert call("prepare", "tiny.txt") is None
for optimizer in "muon", "adamw":
    assert call("train", *TINY, f"--optimizer={optimizer}", f"--out=out/{optimizer}") is None
print("compiler imported:", "torch._dynamo" in sys.modules)
