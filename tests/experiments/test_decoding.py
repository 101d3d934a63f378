"""decoding.py: what the README says of memory and speed is measured, and drawn as it is."""

import itertools
import types

import decoding
import pytest
import torch
from conftest import call

from model import GPTConfig
from train import autocast

SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64)


def test_a_table_of_measured_bytes_and_ratios(capsys, monkeypatch):
    """By a made-up clock: with the cache, a token takes 1/4 s, but qkv's 1/2 s; without, 1 s, or
    half a second less or more. A first one, which reads the prompt, is not timed."""
    number = len(decoding.VARIANTS)
    cached = [0.5, *[0.25] * (number - 1)]
    rounds = [cached, cached]
    rounds += [[seconds] * number for seconds in (0.5, 1.0, 1.5)]
    took = itertools.cycle(itertools.chain.from_iterable(rounds))
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
    expected = {
        "qkv": 128,
        "gqa": 64,
        "mla": 144,
        "qv": 64,
        "qv_ka": 128,
        "gqa, one k, v": 64,
        "qv, one v": 32,
        "qv_ka, one v": 96,
    }
    found = {row[1]: int(row[2]) for row in rows if row[0] == "rope"}
    assert found.items() >= expected.items()
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


def test_the_picture_has_a_box_for_each_vector_and_says_their_sum(tmp_path, saved_figures):
    variants = decoding.PICTURE
    decoding.draw(SHAPE, variants, tmp_path / "memory.png")
    (axes,) = saved_figures[0].axes
    names = ["QKV", "GQA", "MQA", "MLA", "QV", "QV, 1 value", "QV-Ka", "QV-Ka, 1 value, context 32"]
    assert [text.get_text() for text in axes.get_yticklabels()] == names
    for row, variant in enumerate(variants):
        letters, widths = zip(*decoding.remembered(SHAPE, variant))
        ends = [*itertools.accumulate(widths)]
        boxes = [box for box in axes.patches if box.get_y() < row < box.get_y() + box.get_height()]
        assert [box.get_width() for box in boxes] == [*widths]
        assert [box.get_x() for box in boxes] == [0, *ends[:-1]]
        words = [text.get_text().strip() for text in axes.texts if text.get_position()[1] == row]
        assert words == [*letters, str(ends[-1])]


def test_the_picture_is_drawn_of_the_model_of_the_table(tmp_path):
    path = tmp_path / "memory.png"
    assert call("decoding", f"--draw={path}") is None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sum(width for _, width in decoding.remembered(decoding.SMALL, decoding.sweeps.QV)) == 128


def test_wrong_flags_are_refused(capsys):
    for flags, words in (
        (["--pos=alibi"], "--pos=alibi is unknown"),
        (["--tokens=0"], "--tokens=0 must be at least 1"),
    ):
        assert call("decoding", *flags) == 2 and words in capsys.readouterr().err
