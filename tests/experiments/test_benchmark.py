"""benchmark.py at small sizes: all that it measures side by side computes the same."""

import contextlib
import importlib
import itertools
import math
import re

import pytest
import torch
from kernel_helpers import (
    DEVICE,
    conditions,  # noqa: F401
    runs,
    tensor,
)
from torch.nn.attention import SDPBackend

from kernel import attention_plain, decode_plain

pytestmark = [
    runs,
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),  # an empty part's sum
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


@pytest.fixture
def small(monkeypatch):
    """benchmark.py at sizes that the interpreter can compute, with a clock that gives 1, 2, 3 ..
    milliseconds."""
    # It imports the kernel, which kernel_helpers has to do first.
    benchmark, ticks = importlib.import_module("benchmark"), itertools.count(1)
    changed = dict(
        DEVICE=DEVICE,
        DTYPE=torch.float32,
        H=2,
        D=16,
        E=16,
        TOKENS=64,
        LENGTHS=(64, 16),
        DECODE_H=4,
        DECODE_G=2,
        DECODE_E=16,
        BATCHES=(1, 2),
        CONTEXTS=(24, 70),
        timed=lambda run: (run(), next(ticks))[1],
        peak_memory=lambda run: (run(), torch.cuda.memory_allocated() + 2**20)[1],
        flex_attention=lambda: plain_flex,  # not compiled, which takes time
    )
    for name, x in changed.items():
        monkeypatch.setattr(benchmark, name, x)
    monkeypatch.setattr(benchmark.gc, "collect", lambda *_: None)  # takes time, too
    return benchmark


def plain_flex(q, k, v, score_mod, block_mask, scale):
    """What flex_attention returns, with the gradients of the same in plain PyTorch: on the CPU it
    has none."""
    i, j, h = (torch.arange(size, device=DEVICE) for size in (q.size(2), k.size(2), q.size(1)))
    i = i[:, None]
    s = q @ k.mT * scale
    if score_mod is not None:
        s = score_mod(s, None, h[:, None, None], i, j)
    s = s.masked_fill(~block_mask.mask_mod(None, None, i, j), -math.inf)
    out = s.softmax(-1) @ v
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    detached = [x.detach() for x in (q, k, v)]
    exact = flex_attention(*detached, score_mod=score_mod, block_mask=block_mask, scale=scale)
    return out + (exact - out).detach()


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("name", ["qkv", "qv", "qv_ka", "folded"])
def test_contestants_compute_the_same(small, name, decayed):
    """The outputs and the gradients of all that the benchmark times side by side."""
    form = small.FORMS[name](1, 18)
    decay = torch.logspace(-2, 2, 2, base=2, device=DEVICE) if decayed else None
    d_out, first = tensor(1, 18, 2, 16), None
    found = small.contestants(form, decay)
    assert found.keys() >= {"fused", "sdpa", "flex"}
    for make in found.values():
        out = make()()
        result = [out, *torch.autograd.grad(out, form.inputs, d_out)]
        first = first or result
        for x, y in zip(result, first):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_everything_decodes_the_same(small):
    runs = small.attentions_to_decode(2, 70)
    expected = runs["flash_attention"].func(SDPBackend.MATH)
    found = []
    for name in (name for name in runs if not name.startswith("QV")):
        with contextlib.suppress(RuntimeError):  # the CPU has not all of them
            found.append(runs[name]())
    assert found
    for x in found:
        torch.testing.assert_close(x, expected)
    for name in "QV", "QV-Ka", "QV, shared":
        assert runs[name]().shape == (2, 1, 4, 16)


def test_the_benchmark_from_end_to_end(small, capsys, monkeypatch):
    """A line for each shape and contestant, also if rivals break; figures by the made-up clock."""

    def broken():
        raise NotImplementedError("not today")

    monkeypatch.setattr(small.kernel, "attention", attention_plain)  # quicker than the interpreter
    monkeypatch.setattr(small.kernel, "decode", decode_plain)
    monkeypatch.setattr(small, "flex_attention", broken)
    small.benchmark(seconds=600)
    out = capsys.readouterr().out
    for name in "fused", "sdpa":
        assert len(re.findall(rf"decay (?:yes|no )  {name} +\d", out)) == 4 * 2 * 2
    assert "flex: NotImplementedError: not today" in out
    assert (
        "qv      T    64  decay yes  fused      1.000 ms    0     2.000 ms    0       1 MiB   1.00"
        in out
    )
    assert (
        "qv      T    64  decay yes  sdpa       3.000 ms    0     4.000 ms    0       1 MiB   0.50"
        in out
    )
    assert re.search(r"^qv      decay yes  of sdpa +0\.50 +0\.75$", out, re.M)
    assert re.search(r"^     2      70 .* \(\w+\) +\d\.\d\d$", out, re.M)


def test_the_benchmark_stops_when_its_time_is_up(small, capsys):
    small.benchmark(seconds=-1)
    assert not re.search(r"\d ms", capsys.readouterr().out)


def test_whole_models_are_measured_by_either_kernel(small, capsys, monkeypatch):
    sizes = dict(n_layer=1, n_head=2, n_embd=32, d_ctx=16, block_size=4, vocab_size=9)
    changed = dict(
        MODELS={"tiny": (2, sizes)},
        STEPS=2,
        clock=lambda run: (run(), 0.5)[1],
        peak_memory=lambda run: 2**20,
        product=lambda *factors: [("tiny", "qv_ka", "agf", name) for name in ("torch", "triton")],
    )
    for name, x in changed.items():
        monkeypatch.setattr(small, name, x)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    nothing = contextlib.nullcontext()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nothing)  # float32 has none
    small.bench_models(600)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "tiny qv_ka     agf      torch        0.5     500.0       1.0       6.0",
        "tiny qv_ka     agf      triton       0.5     500.0       1.0       6.0",
    ]
