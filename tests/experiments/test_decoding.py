"""decoding.py: what the README says of memory and speed is measured, and drawn as it is."""

import itertools
import types
from unittest import mock

import decoding
import pytest
import torch
from conftest import call

from model import ATTENTIONS, QV, GPTConfig
from train import autocast

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)


def test_a_table_of_measured_bytes_and_ratios(capsys, monkeypatch):
    """By a made-up clock: with the cache, a token takes 1/4 s, but qkv's 1/2 s; without, 1 s."""
    cached = [0.5, *[0.25] * (len(decoding.VARIANTS) - 1)]
    took = itertools.cycle(
        [*cached * 3, *[1.0] * len(cached) * 4]
    )  # a first token, then 2; or then 3
    times = itertools.accumulate(
        itertools.chain.from_iterable((100.0, next(took)) for _ in itertools.count())
    )
    monkeypatch.setattr(decoding, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    cpu = torch.device("cpu")
    decoding.benchmark(
        SHAPE, ["learned", "rope"], cpu, autocast(cpu, "float32"), tokens=2, uncached=3
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][1:]
    names = [*decoding.VARIANTS]
    assert [tuple(row[:2]) for row in rows] == [
        (pos, name) for pos in ("learned", "rope") for name in names
    ]
    assert {row[1]: int(row[2]) for row in rows if row[0] == "rope"} == {
        "qkv": 128,
        "gqa": 64,
        "mla": 144,
        "qv": 64,
        "qv_ka": 128,
        "gqa, one k, v": 64,
        "qv, one v": 32,
        "qv_ka, one v": 96,
    }
    assert rows[0][3:] == ["2", "1.00", "1.0", "1.00"]
    assert all(row[3:] == ["4", "2.00", "1.0", "1.00"] for row in rows[1:8])


@pytest.mark.parametrize(
    "name,parts",
    [
        ("qkv", [("k", 8)] * 2 + [("v", 8)] * 2),
        ("gqa", [("k", 8), ("v", 8)]),
        ("mla", [("c", 32), ("r", 4)]),
        ("qv", [("v", 8)] * 2),
        ("qv_ka", [("v", 8)] * 2 + [("g", 16)]),
        ("qv_ka, one v", [("v", 8), ("g", 16)]),
    ],
)
def test_what_a_token_leaves_behind(name, parts):
    assert decoding.remembered(SHAPE, decoding.VARIANTS[name]) == parts


def test_the_picture_and_its_errors(tmp_path, capsys):
    path = tmp_path / "memory.png"
    mine = {"mine": dict(attention="mine", n_kv_head=None)}  # as the README has one made
    with mock.patch.dict(ATTENTIONS, mine=QV), mock.patch.dict(decoding.VARIANTS, mine):
        assert call("decoding", f"--draw={path}") is None and path.read_bytes().startswith(
            b"\x89PNG"
        )
        assert decoding.remembered(SHAPE, mine["mine"]) == [("?", 8)] * 2
    for flags, words in (
        (["--pos=alibi"], "--pos=alibi is unknown"),
        (["--tokens=0"], "--tokens=0 must be at least 1"),
    ):
        assert call("decoding", *flags) == 2 and words in capsys.readouterr().err
