"""Eight times, two processes ask for the lock of one folder in the same instant. Prints how many of
them had it each time."""

import json
import tempfile
from multiprocessing import get_context
from pathlib import Path

import train


def ask(folder):
    barrier.wait()
    try:
        with train.lock_run_folder(folder):
            won.put(1)
            barrier.wait()
    except train.UserError:
        won.put(0)
        barrier.wait()


fork = get_context("fork")
barrier, won, winners = fork.Barrier(2), fork.SimpleQueue(), []
for _ in range(8):
    with tempfile.TemporaryDirectory() as folder:
        processes = [fork.Process(target=ask, args=(Path(folder),)) for _ in range(2)]
        for process in processes:
            process.start()
        winners.append(won.get() + won.get())
        for process in processes:
            process.join()
print(json.dumps(winners))
