"""An attention of one's own, as the README writes it, and a flag of its own."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import SMALL, assert_equal_functions, small

import model as model_py
import train
from model import ATTENTIONS, GPT, POSITIONS, QV, GPTConfig

README = Path(__file__).parents[1] / "README.md"


def readmes_attention():
    return re.search(r"```python\n(class Keyless.*?)```", README.read_text(), re.DOTALL)[1]


@pytest.fixture
def keyless():
    """The README's attention, at the end of model.py for the time of a test."""
    names, attentions = dict(vars(model_py)), dict(ATTENTIONS)
    exec(readmes_attention(), vars(model_py))
    yield
    vars(model_py).clear()
    vars(model_py).update(names)
    ATTENTIONS.clear()
    ATTENTIONS.update(attentions)


@pytest.mark.parametrize("pos", POSITIONS)
def test_the_readmes_attention_is_qv_with_the_route_in_its_query(keyless, pos):
    fork, qv = small("keyless", pos), small("qv", pos)
    state = fork.state_dict()
    for name in [name for name in state if name.endswith("route")]:
        query = name.replace("route", "q.weight")
        state[query] = (state.pop(name) @ state[query].view(4, 8, 32)).flatten(0, 1)
    qv.load_state_dict(state)
    assert_equal_functions(fork, qv)


def test_a_flag_of_its_own(monkeypatch):
    """A field of GPTConfig, as the README writes it, which the attention reads."""
    attention = readmes_attention().replace(
        "torch.empty(self", "torch.empty(1 if config.shared_route else self"
    )
    field = re.search(r"    (shared_route: bool = .*)\n", README.read_text())[1]
    source, after = Path(model_py.__file__).read_text(), "\n    def sizes(self)"
    assert source.count(after) == 1
    fork = types.ModuleType("fork")
    monkeypatch.setitem(sys.modules, "fork", fork)
    exec(source.replace(after, f"    {field}\n{after}") + "\n\n" + attention, vars(fork))
    for flag, shape in ({"shared_route": True}, (1, 8, 8)), ({}, (4, 8, 8)):
        config = fork.GPTConfig(attention="keyless", **flag, **SMALL)
        assert fork.GPT(config).blocks[0].attention.route.shape == shape


class Louder(QV):
    """QV with a number that its scores are multiplied by."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.tensor(2.0))

    def query(self, x):
        return self.gain * super().query(x)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_single_number_starts_as_it_was_made_and_learns(monkeypatch, optimizer):
    monkeypatch.setitem(ATTENTIONS, "louder", Louder)
    network = GPT(GPTConfig(attention="louder", **SMALL))
    gain = network.blocks[0].attention.gain
    assert gain.item() == 2.0
    settings = train.TrainConfig(batch_size=2, optimizer=optimizer)
    optimizers = train.make_optimizers(network, settings)
    idx = torch.arange(16).view(2, 8)
    precision = train.autocast(torch.device("cpu"), "float32")
    train.train_step(network, optimizers, settings, 0, idx, idx, precision)
    assert gain.item() != 2.0
