"""What the tests of kernel.py share: the kernel, interpreted where there is no GPU, inputs for it,
and comparison with plain PyTorch."""

import math
import os
from itertools import combinations, product
from random import Random
from unittest import mock

import pytest
import torch

# The interpreter is for these tests alone: others need not know that there is one.
CUDA = torch.cuda.is_available()
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRET):
    import kernel
from kernel import attention, attention_plain

DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

runs = pytest.mark.skipif(kernel.triton is None, reason="needs triton")
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU: the interpreter would take hours")
on_cpu = pytest.mark.skipif(CUDA, reason="is about the interpreter, and here is a CUDA GPU")


@pytest.fixture(autouse=True)
def conditions(request, monkeypatch):
    """Under which each test runs that imports this fixture. It draws random numbers of its own, the
    same in each run. New memory is full of NaN, so a kernel that leaves anything unwritten is found
    out. On a GPU float32 stays float32, whatever train.py asks for."""
    for name, value in INTERPRET.items():
        monkeypatch.setenv(name, value)
    torch.manual_seed(sum(map(ord, request.node.name)))
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Cases, inputs and comparison -------------------------------------------------


def pairs(factors, seed=0):
    """Cases in which every two values of two factors meet at least once: the full product would
    take hours."""

    def meetings(case):
        return {((a, case[a]), (b, case[b])) for a, b in combinations(factors, 2)}

    missing = set()
    for a, b in combinations(factors, 2):
        missing |= {((a, x), (b, y)) for x, y in product(factors[a], factors[b])}
    random = Random(seed)
    while missing:
        drawn = [{name: random.choice(x) for name, x in factors.items()} for _ in range(200)]
        best = max(drawn, key=lambda case: len(meetings(case) & missing))
        if meetings(best) & missing:
            missing -= meetings(best)
            yield best


def covering(seed=0, **factors):
    """Parametrizes a test by such cases."""
    cases = list(pairs(factors, seed))
    names = [" ".join(f"{name}={x}" for name, x in case.items()) for case in cases]
    names = [name.replace("torch.", "") for name in names]
    return pytest.mark.parametrize("case", cases, ids=names)


def tensor(*shape, dtype=torch.float32, layout="plain"):
    """Random numbers; `gaps` and `heads first` have other strides than their shape suggests."""
    if layout == "gaps":
        return torch.randn(*shape[:-1], shape[-1] + 16, device=DEVICE).to(dtype)[..., 8:-8]
    if layout == "heads first" and len(shape) == 4:
        return tensor(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)
    return torch.randn(*shape, device=DEVICE).to(dtype)


def inputs(T, D, keys=False, E=0, decay=False, dtype=torch.float32, BHG=(1, 2, 2), past=0,
           layout="plain"):  # fmt: skip
    """The tensors of a call by name, leaves that want gradients. `one buffer`: rows [ctx; v]."""
    (B, H, G), S = BHG, T + past
    shapes = dict(q=(B, T, H, D), v=(B, S, G, D))
    if keys:
        shapes |= dict(k=(B, S, G, D))
    if E:
        shapes |= dict(q_ctx=(B, T, H, E), ctx=(B, S, E))
    made = {name: tensor(*shape, dtype=dtype, layout=layout) for name, shape in shapes.items()}
    if layout == "one buffer":
        rows = tensor(B, S, E + G * D, dtype=dtype)
        made["v"] = rows[..., E:].unflatten(-1, (G, D))
        if E:
            made["ctx"] = rows[..., :E]
    if decay:
        made["decay"] = torch.rand(H, device=DEVICE) * 2 + 0.1
    return {name: x.detach().requires_grad_() for name, x in made.items()}


def double(tensors):
    return {name: x.detach().double().requires_grad_() for name, x in tensors.items()}


def results(function, tensors, d_out, **options):
    """What a function returns, and the gradients of its inputs, by name."""
    out = function(**tensors, **options)
    gradients = torch.autograd.grad(out, [*tensors.values()], d_out.to(out.dtype))
    return {"output": out} | {f"gradient of {name}": x for name, x in zip(tensors, gradients)}


def assert_close(found, expected, tolerance):
    """By the norm of the difference; where the truth is nearly nothing, against the size that it
    could have had: the decay's gradient is a sum over all B T queries, in which much cancels."""
    B, T = found["output"].shape[:2]
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        x = found[name]
        assert x.shape == y.shape and x.isfinite().all(), name
        possible = math.sqrt(y.numel() * (B * T if y.dim() == 1 else 0.01))
        error = (x.double() - y).norm() / max(y.norm(), possible)
        assert error < tolerance, f"{name} is off by {error:.1e}"


def assert_right(tensors, tolerance, **options):
    """The kernel's output and gradients are the plain formula's in float64."""
    d_out = tensor(*tensors["q"].shape)
    expected = results(attention_plain, double(tensors), d_out, **options)
    assert_close(results(attention, tensors, d_out, **options), expected, tolerance)
