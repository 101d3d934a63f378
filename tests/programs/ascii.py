"""Prepares, trains and samples Chinese where everything is ASCII: the locale, and standard
output."""

import os
import subprocess
import sys
from pathlib import Path

if os.environ.get("LC_ALL") != "C":
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ascii["PYTHONIOENCODING"] = "ascii"
    sys.exit(subprocess.run([sys.executable, __file__], env=os.environ | ascii).returncode)

from conftest import TINY, call

Path("dogs.txt").write_text("\u5c0f\u72d7 na\u00efve " * 200, encoding="utf-8")
assert call("prepare", "dogs.txt") is None
assert call("train", "--dataset=dogs", *TINY[1:], "--out=out/dogs") is None
assert call("sample", "--out=out/dogs", "--max_new_tokens=30") is None
