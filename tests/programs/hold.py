"""Holds the lock of a run's folder until standard input ends."""

import sys
from pathlib import Path

import train

with train.lock_run_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
