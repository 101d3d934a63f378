"""Two processes train, and one fails in several ways. Prints, for each way and each process, what
it said, how long it took, which step was saved, and how many threads of gloo it has left,
and how many models had the group when it was left."""

import gc
import json
import os
import signal
import time
from pathlib import Path

from conftest import TINY, call, checkpoint
from pair import answer, meet, start

import prepare
import train

FLAGS = [*TINY, "--max_steps=9", "--eval_interval=3", "--eval_tokens=99"]


def threads_of_gloo():
    """0 also where the system does not tell."""
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def failing_batch(data, config, block_size, step, device):
    x, y = batch(data, config, block_size, step, device)
    if step == 4 and train.RANK == 1 and way == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if step == 4 and train.RANK == 1 and way == "nan":
        y = y.clone().fill_(-100)  # nothing to predict: the mean over nothing
    return x, y


def failing_write(path, write_to):
    if way == "save" and path.name == "last.pt":
        raise prepare.UserError("the disk is full")
    if way == "stop":
        time.sleep(0.1)  # a slow disk: the other one has to wait
    write(path, write_to)


def other_data(name):
    meta, splits = read_dataset(name)
    if way == "other" and train.RANK == 1:
        meta["sha256"] = {"train": "of another text", "val": ""}
    return meta, splits


def destroy_process_group():
    """Counts the models that still have the group, and would wait for ever when they go."""
    global holders
    objects = gc.get_objects()
    holders = sum(isinstance(x, train.DistributedDataParallel) for x in objects)
    destroy()


def one_of_two():
    """Run in each of the two processes."""
    global way
    train.dist.destroy_process_group = destroy_process_group
    train.batch, train.write_atomically = failing_batch, failing_write
    prepare.read_dataset = other_data
    found = {}
    for way in "stop", "nan", "save", "data", "other":
        meet(way)
        dataset = ["--dataset=nowhere"] if way == "data" else []
        began = time.monotonic()
        said = call("train", *FLAGS, *dataset, f"--out=out/{way}")
        path = Path("out", way, "last.pt")
        found[way] = {
            "said": str(said),
            "seconds": time.monotonic() - began,
            "saved": len(checkpoint(path.parent)["losses"]) if path.exists() else None,
            "threads": threads_of_gloo(),
            "holders": holders,
        }
    answer(found)


destroy, holders = train.dist.destroy_process_group, None
batch, write, read_dataset = train.batch, train.write_atomically, prepare.read_dataset
if "RANK" in os.environ:
    one_of_two()
else:
    first, second = start(__file__)
    print(json.dumps({way: [first[way], second[way]] for way in first}))
