"""Trains by two processes in several ways, and prints what came out as JSON."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, call, checkpoint, log, on_batch
from pair import answer, meet, start

import train
from model import ATTENTIONS, GPT, GPTConfig

TWO = [*TINY, "--eval_interval=2"]
DROPOUT = [*TWO, "--dropout=0.5", "--micro_batch_size=1"]


class Partly(ATTENTIONS["qv"]):
    """An attention with parameters that are frozen, or that nothing uses."""

    def __init__(self, config):
        super().__init__(config)
        self.q.weight.requires_grad_(False)
        self.unused_matrix = torch.nn.Parameter(torch.ones(3, 4))
        self.unused_vector = torch.nn.Parameter(torch.ones(3))


def as_lists(state):
    return {name: weight.tolist() for name, weight in state.items()}


def result(name):
    state = checkpoint(f"out/{name}")
    return {
        "log": log(f"out/{name}"),
        "losses": state["losses"],
        "weights": as_lists(state["model"]),
    }


def main():
    """Starts torchrun as its users do, and then this program twice."""
    first, second = start(__file__)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, ROOT / "train.py", *TWO, "--out=out/two"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    first["two"] = result("two") | {"output": finished.stdout, "errors": finished.stderr}
    first["seeds"] = [first["seeds"], second["seeds"]]
    print(json.dumps(first))


def train_in(name, *flags, out=None):
    meet(name)
    assert call("train", *flags, f"--out=out/{out or name}") is None


def one_of_two():
    found = {}
    train_in("whole", *DROPOUT)
    with pytest.MonkeyPatch.context() as patch:
        if train.RANK == 1:
            on_batch(patch, {2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        meet("parts")
        assert call("train", *DROPOUT, "--out=out/parts") is not None
    train_in("rest", "--resume", out="parts")

    ATTENTIONS["partly"] = Partly
    train_in("partly", *TWO, "--attention=partly")

    # The seeds that a process has set: of its weights, and of the dropout of each step.
    seeds, set_seed = [], torch.manual_seed
    torch.manual_seed = lambda seed: (seeds.append(seed), set_seed(seed))
    train_in("seeds", *TWO)
    torch.manual_seed = set_seed

    if train.RANK == 1:
        train.GPT = other_weights
    train_in("others", *TWO)

    if train.RANK == 0:
        found = {name: result(name) for name in ("whole", "parts", "partly", "others")}
        torch.manual_seed(1337)
        config = GPTConfig(**checkpoint("out/partly")["model_config"])
        found["partly"]["initial"] = as_lists(GPT(config).state_dict())
    answer(found | {"seeds": seeds})


def other_weights(config):
    model = GPT(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(1.0)
    return model


if "RANK" in os.environ:
    one_of_two()
else:
    main()
