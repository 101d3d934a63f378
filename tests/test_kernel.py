"""kernel.py against plain PyTorch: on a GPU if there is one, else in Triton's interpreter, which runs the same kernels
on the CPU; and compiled ahead of time for GPUs that need not be there, in a process beside the other tests."""

import contextlib
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import weakref
from itertools import combinations, product
from random import Random
from unittest import mock
from weakref import WeakSet

import pytest
import torch
from conftest import BESIDE, TINY, call
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
INTERPRET = {} if CUDA else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(
    os.environ, INTERPRET
):  # only here and during these tests: the others need not know
    import kernel
from kernel import qv_attention, qv_attention_plain, qv_decode
from model import GPT, GPTConfig
from prepare import UserError

DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:divide by zero encountered in log2"
    ),  # of an empty part's sum
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
runs = pytest.mark.skipif(
    not CUDA and not kernel.INTERPRETED, reason="needs triton, and a GPU or its interpreter"
)
VERSION = kernel.triton and tuple(map(int, kernel.triton.__version__.split(".")[:2]))
compiles = pytest.mark.skipif(kernel.triton is None, reason="needs triton")


def pairs(seed=0, **factors):
    """Cases in which every two values of two factors meet at least once: the full product would take hours."""
    random, names = Random(seed), list(factors)
    meetings = lambda case: {((a, case[a]), (b, case[b])) for a, b in combinations(names, 2)}
    missing = {
        ((a, x), (b, y))
        for a, b in combinations(names, 2)
        for x, y in product(factors[a], factors[b])
    }
    while missing:
        drawn = [
            {name: random.choice(values) for name, values in factors.items()} for _ in range(200)
        ]
        best = max(drawn, key=lambda case: len(meetings(case) & missing))
        if meetings(best) & missing:
            missing -= meetings(best)
            yield best


def cases(**factors):
    return [
        pytest.param(
            case, id=" ".join(f"{name}={str(x).removeprefix('torch.')}" for name, x in case.items())
        )
        for case in pairs(**factors)
    ]


def tensor(*shape, dtype=torch.float32, layout="plain"):
    """Random numbers, anew for each case; `gaps` and `heads first` have other strides than their shape suggests."""
    if layout == "gaps":
        return torch.randn(*shape[:-1], shape[-1] + 16, device=DEVICE).to(dtype)[..., 8:-8]
    if layout == "heads first" and len(shape) == 4:
        return (
            torch.randn(shape[0], shape[2], shape[1], shape[3], device=DEVICE)
            .to(dtype)
            .transpose(1, 2)
        )
    return torch.randn(*shape, device=DEVICE).to(dtype)


def inputs(T, D, E=0, decay=False, dtype=torch.float32, BHG=(1, 2, 2), past=0, layout="plain"):
    """q, v, q_ctx, ctx and decay, leaves that want gradients, or None."""
    (B, H, G), S = BHG, T + past
    shapes = [(B, T, H, D), (B, S, G, D), *([(B, T, H, E), (B, S, E)] if E else [])]
    made = [tensor(*shape, dtype=dtype, layout=layout) for shape in shapes] + [None] * (
        4 - len(shapes)
    )
    if layout == "one buffer":  # as the model's cache: rows [context ; v of G heads]
        row = tensor(B, S, E + G * D, dtype=dtype)
        made[1] = row[..., E:].unflatten(-1, (G, D))
        made[3] = row[..., :E] if E else None
    made += [torch.rand(H, device=DEVICE) * 2 + 0.1 if decay else None]
    return [x if x is None else x.detach().requires_grad_() for x in made]


def results(function, tensors, d_out):
    """What a function returns, and the gradients of its inputs."""
    out = function(*tensors)
    return [
        out,
        *torch.autograd.grad(out, [x for x in tensors if x is not None], d_out.to(out.dtype)),
    ]


def assert_close(found, expected, tolerance):
    """By the norm of the difference; where the truth is nearly nothing, against the size that it could have had: the
    decay's gradient is a sum over all B T queries, in which much cancels."""
    B, T = found[0].shape[:2]
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.isfinite().all()
        error = (x.double() - y).norm() / max(
            y.norm(), math.sqrt(y.numel() * (B * T if y.dim() == 1 else 0.01))
        )
        assert error < tolerance, f"{tuple(x.shape)}: {error:.1e}"


def double(tensors):
    return [
        x if x is None or not x.is_floating_point() else x.detach().double().requires_grad_()
        for x in tensors
    ]


@pytest.fixture(autouse=True)
def poison():
    """New memory is full of NaN, so a kernel that leaves anything unwritten is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def interpret():
    with mock.patch.dict(os.environ, INTERPRET):
        yield


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """On a GPU float32 stays float32, whatever train.py asks for."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


@pytest.fixture(autouse=True)
def fresh(request):
    """Other random numbers for each test, the same in each run."""
    torch.manual_seed(sum(map(ord, request.node.name)))


# Forward and backward -------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize(
    "case",
    cases(
        T=[1, 2, 17, 33, 46],
        D=[16, 32, 64, 128],
        E=[0, 16, 64],
        decay=[False, True],
        dtype=DTYPES,
        BHG=[(1, 1, 1), (2, 2, 2), (1, 3, 1), (1, 4, 2)],
        past=[0, 1, 15, 34],
        layout=["plain", "gaps", "heads first", "one buffer"],
    ),
)
def test_output_and_all_gradients(case):
    tensors, d_out = inputs(**case), tensor(case["BHG"][0], case["T"], case["BHG"][1], case["D"])
    expected = results(qv_attention_plain, double(tensors), d_out)
    assert_close(results(qv_attention, tensors, d_out), expected, TOLERANCE[case["dtype"]])


@pytest.mark.skipif(CUDA, reason="for the interpreter: on a GPU 16-bit numbers are cut so anyway")
@runs
@pytest.mark.parametrize("column", range(1, 5))
def test_every_way_to_cut_the_scores(column, monkeypatch):
    """The tiles of 16-bit numbers, in float32, where a wrong index cannot pass for rounding."""
    tiles = {name: (columns[column],) for name, columns in kernel.TILES.items()}
    monkeypatch.setattr(kernel, "TILES", tiles)
    tensors, d_out = (
        inputs(T=141, D=16, E=16 * (column % 2), decay=True, past=9, BHG=(1, 2, 1)),
        tensor(1, 141, 2, 16),
    )
    assert_close(
        results(qv_attention, tensors, d_out),
        results(qv_attention_plain, double(tensors), d_out),
        1e-5,
    )


@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU: in the interpreter this would take hours")
@pytest.mark.parametrize(
    "case",
    cases(
        seed=1,
        T=[511, 1024, 4096],
        D=[16, 32, 64, 128],
        E=[0, 16, 32, 64, 128],
        decay=[False, True],
        dtype=list(TOLERANCE),
        past=[0, 77],
    ),
)
def test_long_sequences_on_a_gpu(case):
    tensors, d_out = inputs(**case), tensor(1, case["T"], 2, case["D"])
    expected = results(qv_attention_plain, double(tensors), d_out)
    assert_close(results(qv_attention, tensors, d_out), expected, TOLERANCE[case["dtype"]])


@runs
def test_rows_may_lie_far_apart(tmp_path):
    """2^31 numbers from first to last: more than 32 bits can count, in a file that is nearly all hole."""
    size = 128 * 2**24 + 16
    far = (
        torch.empty(size, dtype=torch.float16, device=DEVICE)
        if CUDA
        else torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=torch.float16)
    )
    far = far.as_strided((1, 129, 1, 16), (1, 2**24, 16, 1))
    near = far.copy_(tensor(1, 129, 1, 16)).clone()
    assert torch.equal(qv_attention(far, far), qv_attention(near, near))
    assert torch.equal(
        qv_decode(near[:, :1], far, lengths=torch.tensor([129], device=DEVICE)),
        qv_decode(near[:, :1], near, lengths=torch.tensor([129], device=DEVICE)),
    )


@runs
def test_the_same_bits_every_time():
    tensors, d_out = inputs(T=20, D=16, E=16, decay=True, BHG=(1, 4, 2)), tensor(1, 20, 4, 16)
    first, second = (results(qv_attention, tensors, d_out) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@runs
def test_the_future_does_not_matter():
    q, v, q_ctx, ctx, decay = (x.detach() for x in inputs(T=30, D=16, E=16, decay=True))
    before = qv_attention(q, v, q_ctx, ctx, decay)
    v[:, 23:], ctx[:, 23:] = 1e4, -1e4
    after = qv_attention(q, v, q_ctx, ctx, decay)
    assert torch.equal(before[:, :23], after[:, :23]) and not torch.equal(
        before[:, 23:], after[:, 23:]
    )


@runs
@pytest.mark.parametrize("size", [1e-4, 30.0, 3000.0])
def test_scores_of_any_size(size):
    q, v, *_ = inputs(T=19, D=16)
    q = (q.detach() * size).requires_grad_()
    d_out = tensor(1, 19, 2, 16)
    found, expected = (
        results(f, x, d_out)
        for f, x in ((qv_attention, [q, v]), (qv_attention_plain, double([q, v])))
    )
    assert_close(
        found[:1], expected[:1], 2e-3 if size > 1000 else 1e-5
    )  # scores of 10^4 keep three digits of exp
    assert all(x.isfinite().all() for x in found)


@runs
def test_an_operator_like_any_other():
    """Schema, fake tensors and autograd as torch.compile expects them, and no graph break."""
    tensors = inputs(T=20, D=16, E=16, decay=True)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for case in (tensors, [*tensors[:2], None, None, None]):
        torch.library.opcheck(kernel.attention_op, tuple(case), test_utils=checks)
    (d_q,) = torch.autograd.grad(
        kernel.attention_op(*tensors)[0].sum(), tensors[0]
    )  # and nothing for lse
    assert d_q.isfinite().all()
    twice, d_out = lambda *x: 2 * qv_attention(*x), tensor(1, 20, 2, 16)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    checkpointed = lambda *x: checkpoint(
        twice, *x, use_reentrant=False
    )  # recomputes outputs in backward
    for x, *others in zip(
        *(results(function, tensors, d_out) for function in (twice, compiled, checkpointed))
    ):
        assert all(torch.equal(x, y) for y in others)
    q, v, lengths = (
        tensors[0][:, -1:].detach(),
        tensors[1].detach(),
        torch.tensor([20], device=DEVICE),
    )
    step = torch.compile(qv_decode, backend="aot_eager", fullgraph=True)
    assert_close([step(q, v, lengths=lengths)], [qv_attention_plain(*double([q, v]))], 1e-5)


@runs
@pytest.mark.parametrize(
    "function",
    [
        qv_attention,
        lambda q, v: qv_decode(q[:, -1:], v, lengths=torch.full((1,), 5, device=q.device)),
    ],
)
def test_other_lengths_take_no_other_graph(function):
    """torch.compile takes the first length for a constant, the second for a variable, and any other as that one."""
    torch.compiler.reset()
    counter = importlib.import_module(
        "torch._dynamo.testing"
    ).CompileCounter()  # imports triton: too early above
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for T in 5, 6, 7, 9, 12:
        q, v = tensor(1, T, 2, 16), tensor(1, T, 2, 16)
        assert torch.equal(compiled(q, v), function(q, v))
    assert counter.frame_count == 2


class Memory(TorchDispatchMode):
    """Counts the bytes of what is made under it, `now` and `peak`, and keeps the names of functions that make it."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known, self.functions = 0, 0, WeakSet(), set()

    def count(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.functions.add(str(function))
        storage = result.untyped_storage() if isinstance(result, torch.Tensor) else None
        if storage is not None and storage not in self.known:
            self.known.add(storage)
            self.count(storage.nbytes())
            weakref.finalize(storage, self.count, -storage.nbytes())
        return result


@runs
def test_gradient_of_a_plain_sum():
    """sum() hands down a gradient that is one number, of stride 0; and nobody makes zeros for lse, which has none."""
    q, v, *_ = inputs(T=17, D=16)
    total = qv_attention(q, v).sum()
    with Memory() as memory:
        total.backward()
    (d_v,) = torch.autograd.grad(qv_attention_plain(q, v).sum(), v)
    assert_close([v.grad], [d_v.double()], 1e-5)
    assert not any("zeros" in name for name in memory.functions)


@runs
@pytest.mark.parametrize("E,G", [(0, 12), (64, 12), (128, 12), (64, 3), (0, 1)])
def test_backward_has_room_for_little_but_the_gradients(E, G):
    """What each head wants of the context has the size of q_ctx's gradient, and has to be gone before that is made."""
    tensors = inputs(T=128, D=64, E=E, decay=True, BHG=(1, 12, G), dtype=torch.float16)
    d_out, nothing = torch.ones_like(tensors[0]), lambda *args, **widths: None
    with torch.no_grad(), Memory() as memory:
        out, lse = kernel.forward(*tensors, launch=nothing)
        gradients = kernel.backward(d_out, *tensors, out, lse, launch=nothing)
    kept = out.nbytes + lse.nbytes + sum(x.nbytes for x in gradients)
    assert kept <= memory.now and memory.peak < 1.05 * kept


# Decoding -------------------------------------------------------------------------------------------------------------


def decode_plain(q, v, q_ctx=None, ctx=None, decay=None, lengths=None):
    """qv_decode, one sequence after the other."""
    outs = []
    for b, n in enumerate(lengths.tolist()):
        context = (None, None) if ctx is None else (q_ctx[b, None], ctx[b, None, :n])
        outs.append(qv_attention_plain(q[b, None], v[b, None, :n], *context, decay))  # (1, 1, H, D)
    return torch.cat(outs)


@runs
@pytest.mark.parametrize(
    "case",
    cases(
        lengths=[(1,), (64, 1), (90, 7, 130)],
        D=[16, 32, 64, 128],
        E=[0, 16, 64],
        decay=[False, True],
        dtype=DTYPES,
        HG=[(1, 1), (6, 6), (6, 2), (16, 8), (20, 1)],
        layout=["plain", "gaps", "heads first", "one buffer"],
        index=[torch.int32, torch.int64],
    ),
)
def test_decoding(case):
    """Ragged sequences in a cache of 130 tokens, the rest of which is NaN; up to 20 heads that ask one value."""
    lengths = torch.tensor(case["lengths"], dtype=case["index"], device=DEVICE)
    B, (H, G) = len(lengths), case["HG"]
    D, E, options = case["D"], case["E"], dict(dtype=case["dtype"], layout=case["layout"])
    q, v, q_ctx, ctx, decay = inputs(1, D, E, case["decay"], BHG=(B, H, G), past=129, **options)
    q, v, q_ctx, ctx, decay = (x if x is None else x.detach() for x in (q, v, q_ctx, ctx, decay))
    for b, n in enumerate(case["lengths"]):
        v[b, n:] = math.nan
        if E:
            ctx[b, n:] = math.nan
    expected = decode_plain(*double([q, v, q_ctx, ctx, decay, lengths]))
    found = qv_decode(q, v, q_ctx, ctx, decay, lengths)
    assert_close([found], [expected], TOLERANCE[case["dtype"]])
    assert torch.equal(found, qv_decode(q, v, q_ctx, ctx, decay, lengths))


@runs
def test_decoding_with_more_parts_than_tokens():
    """Every number of parts, most of them empty, gives the same mean."""
    q, v, lengths = (
        tensor(2, 1, 2, 16),
        tensor(2, 400, 2, 16),
        torch.tensor([400, 17], device=DEVICE),
    )
    expected = decode_plain(*double([q, v]), lengths=lengths)
    assert_close([qv_decode(q, v, lengths=lengths)], [expected], 1e-5)  # 6 parts in the interpreter
    assert_close(
        [qv_decode(q[1:], v[1:], lengths=lengths[1:])], [expected[1:]], 1e-5
    )  # 7 parts, 5 empty


# The trial ------------------------------------------------------------------------------------------------------------

TRIAL = dict(T=17, H=2, G=1, D=16, E=16, decay=True, dtype=torch.float32, device=DEVICE)


@runs
@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(E=0, decay=False, G=2),
        dict(training=False, dtype=torch.float16),
        dict(T=1, H=1, G=1),
    ],
)
def test_the_trial_finds_nothing_wrong(changed):
    with mock.patch.object(kernel, "backward_op", wraps=kernel.backward_op) as backward:
        assert kernel.trial(**TRIAL | changed) is None
    assert backward.called == changed.get("training", True)


@runs
@pytest.mark.parametrize(
    "name,wrong,words",
    [
        (
            "qv_attention",
            lambda *args, **inputs: 1.001 * qv_attention(*args, **inputs),
            "the output is off by 0.1%",
        ),
        (
            "qv_attention",
            lambda *args, **inputs: torch.nan * qv_attention(*args, **inputs),
            "the output is off by nan%",
        ),
        (
            "qv_attention",
            lambda q, v, **inputs: qv_attention(q, v.detach() + 0.9 * (v - v.detach()), **inputs),
            "the gradient of v is off by 10.0%",
        ),
        (
            "qv_attention",
            lambda decay, **inputs: qv_attention(decay=decay.detach() + 0 * decay, **inputs),
            "the gradient of decay is off by 100.0%",
        ),
        (
            "qv_decode",
            lambda *args, **inputs: 0.9 * qv_decode(*args, **inputs),
            "a decoded token is off by 10.0%",
        ),
    ],
)
def test_the_trial_finds_wrong_numbers(name, wrong, words, monkeypatch):
    monkeypatch.setattr(kernel, name, wrong)
    version = kernel.triton.__version__
    with pytest.raises(
        UserError, match=rf"computes wrong numbers with Triton {version} on .*{words}"
    ):
        kernel.trial(**TRIAL)


def failures():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return [
        OutOfResources(300000, 232448, "shared memory"),
        PTXASError("ptxas died"),
        CompilationError("x = 1", None, "no such thing"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access"),
        FileNotFoundError(2, "No such file", "gcc"),
        subprocess.CalledProcessError(1, ["gcc"]),
    ]


@runs
@pytest.mark.parametrize("i", range(6))
def test_the_trial_says_what_triton_says(i, monkeypatch):
    error = failures()[i]
    monkeypatch.setattr(kernel, "qv_decode", mock.Mock(side_effect=error))
    words = rf"the fused kernel fails with Triton .* on .* \({type(error).__name__}: "
    with pytest.raises(UserError, match=words) as raised:
        kernel.trial(**TRIAL | dict(training=False, E=0))
    assert "\n" not in str(raised.value)


@runs
@pytest.mark.parametrize("hip,capability", [("6.4", (9, 4)), (None, (7, 5))])
def test_other_gpus_are_refused(hip, capability, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the card")
    x = mock.Mock(is_cuda=True)
    with pytest.raises(
        UserError, match="needs an NVIDIA GPU of compute capability 8.0 .* and this is the card"
    ):
        kernel.launch(None, (1,), (x,))


# In the model ---------------------------------------------------------------------------------------------------------

USES = [
    ("qv", "learned", 2),
    ("qv", "rope", 1),
    ("qv_ka", "sinusoidal", 2),
    ("qv_ka", "rope", 2),
    ("qv_ka", "agf", 1),
]


def models(attention, pos, G=2, **options):
    """Two models with the same weights: by PyTorch, and by the kernel."""
    config = GPTConfig(
        **dict(
            attention=attention,
            pos=pos,
            n_layer=1,
            n_head=2,
            n_kv_head=G,
            n_embd=32,
            d_ctx=32,
            block_size=30,
        )
        | options
    )
    plain, fused = GPT(config).to(DEVICE), GPT(config).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    for block in fused.blocks:  # as use_kernel does after a trial
        block.attention.kernel = kernel
    return plain, fused


def assert_learn_the_same(a, b, losses):
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, x), y in zip(a.named_parameters(), b.parameters()):
        assert (x.grad - y.grad).norm() < 1e-4 * x.grad.norm(), name


@runs
@pytest.mark.parametrize("attention,pos,G", USES)
def test_the_model_learns_the_same_by_either(attention, pos, G):
    plain, fused = models(attention, pos, G, shared_wk=pos == "agf")
    x, y = torch.randint(65, (2, 2, 19), device=DEVICE)
    with mock.patch.object(kernel, "qv_attention", wraps=qv_attention) as used:
        losses = [model(x, y)[1] for model in (plain, fused)]
    assert used.call_count == 1, "once a layer, and not at all by PyTorch"
    assert_learn_the_same(plain, fused, losses)


@runs
@pytest.mark.parametrize("attention,pos,G", USES)
def test_the_model_generates_the_same_by_either(attention, pos, G):
    """A prompt of several tokens, decoding from the cache's buffers as they lie, and a context that runs full."""
    plain, fused = (model.eval() for model in models(attention, pos, G))
    prompt = torch.randint(65, (2, 21), device=DEVICE)
    with mock.patch.object(kernel, "qv_decode", wraps=qv_decode) as used:
        texts = [
            torch.cat([*model.generate(prompt, 13, temperature=0)], 1) for model in (plain, fused)
        ]
    assert used.call_count > 10 and torch.equal(*texts)
    v = used.call_args.args[1]
    assert v.size(1) < 30 and v.stride(0) == 30 * v.stride(1), (
        "the cache's own buffer of 30 tokens, not a part's copy"
    )
    logits = []
    for model in plain, fused:
        cache = model.new_cache()
        with torch.no_grad():
            logits.append(
                [
                    model(idx, cache=cache)[0]
                    for idx in (prompt[:, :11], prompt[:, 11:20], prompt[:, 20:])
                ]
            )
    for theirs, ours in zip(*logits):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@runs
def test_the_compiled_model_takes_the_kernel_whole():
    """torch.compile sees one operator in the kernel's place: no graph break, and the same loss and gradients."""
    eager, compiled = models("qv_ka", "agf")[1], models("qv_ka", "agf")[1]
    compiled.load_state_dict(eager.state_dict())
    x, y = torch.randint(65, (2, 2, 21), device=DEVICE)
    losses = [
        model(x, y)[1]
        for model in (eager, torch.compile(compiled, fullgraph=True, backend="aot_eager"))
    ]
    assert_learn_the_same(eager, compiled, losses)


@runs
def test_the_programs_take_the_kernel_and_say_so(folder, capsys):
    shape = ["--n_embd=32", "--attention=qv", "--eval_tokens=256"]
    for name in "torch", "triton":
        options = [f"--kernel={name}", f"--out=out/{name}", f"--device={DEVICE}"]
        assert call("train", *TINY, *shape, *options, "--dtype=float32") is None
        assert f"attention by {name}" in capsys.readouterr().out
        assert call("sample", *options, "--prompt=wall", "--max_new_tokens=9") is None
        assert f"attention by {name}" in capsys.readouterr().err
    logs = [
        (folder / "out" / name / "log.jsonl").read_text().splitlines()
        for name in ("torch", "triton")
    ]
    logs = [[json.loads(line)["val_loss"] for line in lines] for lines in logs]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and len(logs[0]) == 2


@runs
@pytest.mark.parametrize(
    "flags,words",
    [
        (["--attention=qkv"], "it is for qv and qv_ka"),
        (["--dropout=0.1"], "has no dropout in training"),
        (["--n_embd=16"], "should be (B, T, H, D) with D and E 16, 32, 64 or 128"),
        (["--d_ctx=20"], "should be (B, T, H, E) with D and E 16, 32, 64 or 128"),
    ],
)
def test_what_the_kernel_cannot_do_is_a_sentence(folder, flags, words):
    message = call("train", *TINY, "--n_embd=32", "--kernel=triton", *flags, f"--device={DEVICE}")
    assert words in message


@pytest.mark.skipif(
    not CUDA,
    reason="needs a CUDA GPU: 200 steps in bfloat16, which the interpreter cannot multiply",
)
@pytest.mark.parametrize("attention,pos", [("qv", "agf"), ("qv_ka", "rope")])
def test_200_steps_of_training_follow_pytorch(attention, pos):
    """In bfloat16, from the same weights and batches; float32 in PyTorch says how far bfloat16 alone moves losses."""
    plain, fused = models(attention, pos, n_layer=4, n_head=4, n_embd=256, d_ctx=64, block_size=256)
    exact = models(attention, pos, n_layer=4, n_head=4, n_embd=256, d_ctx=64, block_size=256)[0]
    exact.load_state_dict(plain.state_dict())
    text = torch.randint(65, (20_000,), device=DEVICE) // 2 * 2  # something to learn: even tokens
    losses = []
    for model, dtype in (exact, torch.float32), (plain, torch.bfloat16), (fused, torch.bfloat16):
        optimizer, random = (
            torch.optim.AdamW(model.parameters(), lr=1e-3),
            torch.Generator().manual_seed(1),
        )
        losses.append([])
        for _ in range(200):
            starts = torch.randint(len(text) - 257, (16,), generator=random).tolist()
            batch = torch.stack([text[start : start + 257] for start in starts])
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(batch[:, :-1], batch[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    exact, plain, fused = map(torch.tensor, losses)
    assert exact[-1] < exact[0] - 0.3
    noise = (plain - exact).abs().mean()
    assert (fused - exact).abs().mean() < 2 * noise + 1e-4, (
        f"{(fused - exact).abs().mean():.2e} against {noise:.2e}"
    )


# Errors ---------------------------------------------------------------------------------------------------------------

GOOD = dict(q=(2, 4, 4, 16), v=(2, 6, 2, 16), q_ctx=(2, 4, 4, 32), ctx=(2, 6, 32), decay=(4,))


def change(name, function):
    return lambda x: x | {name: function(x[name])}


@runs
@pytest.mark.parametrize(
    "wrong,words",
    [
        (change("q", lambda x: x.double()), r"q\.dtype=torch\.float64 should be torch\.float32 or"),
        (change("v", lambda x: x.half()), r"v\.dtype=torch\.float16 should be torch\.float32"),
        (change("ctx", lambda x: x.half()), r"ctx\.dtype=torch\.float16 should be torch\.float32"),
        (change("decay", lambda x: x.long()), r"decay\.dtype=torch\.int64 should be"),
        (change("q", lambda x: x[0]), r"q\.shape=\(4, 4, 16\) should be \(B, T, H, D\)"),
        (change("q", lambda x: x[..., :15]), r"q\.shape=.* D and E 16, 32, 64 or 128"),
        (change("q", lambda x: x[:, :0]), r"q\.shape=\(2, 0, 4, 16\) .* others from 1 to 999,999"),
        (change("v", lambda x: x[:1]), r"v\.shape=\(1, 6, 2, 16\) should be \(B, S, G, D\) .* B=2"),
        (change("v", lambda x: x[:, :, :0]), r"v\.shape=\(2, 6, 0, 16\) .* others from 1"),
        (change("v", lambda x: x.repeat(1, 1, 4, 1)), r"G=8 should be a divisor of H=4"),
        (change("v", lambda x: x[:, :, [0, 0, 1]]), r"G=3 should be a divisor of H=4"),
        (change("v", lambda x: x.repeat(1, 1, 1, 2)), r"v\.shape=.* D=16"),
        (change("q_ctx", lambda x: x[:, :2]), r"q_ctx\.shape=.* T=4"),
        (change("q_ctx", lambda x: x[..., :8]), r"q_ctx\.shape=.* E 16, 32"),
        (change("ctx", lambda x: x[:, :5]), r"ctx\.shape=\(2, 5, 32\) .* S=6"),
        (change("ctx", lambda x: x[..., :16]), r"ctx\.shape=.* E=32"),
        (change("decay", lambda x: x[:2]), r"decay\.shape=\(2,\) should be \(H\) .* H=4"),
        (
            change("q", lambda x: x.repeat_interleave(2, -1)[..., ::2]),
            r"q\.stride\(\)=.* should be 1 at the end",
        ),
        (
            change("ctx", lambda x: x.mT.contiguous().mT),
            r"ctx\.stride\(\)=.* should be 1 at the end",
        ),
        (change("ctx", lambda x: None), r"ctx=None should be a tensor; q_ctx and ctx go together"),
        (
            change("q_ctx", lambda x: None),
            r"q_ctx=None should be a tensor; q_ctx and ctx go together",
        ),
        (change("v", lambda x: None), r"v=None should be a tensor"),
        (change("decay", lambda x: 1.0), r"decay=1\.0 should be a tensor"),
        (change("ctx", lambda x: x.to("meta")), r"ctx\.device=meta should be (cpu|cuda:0)"),
        (lambda x: x | {"v": x["v"][:, :3], "ctx": x["ctx"][:, :3]}, r"S=3 should be at least T=4"),
        (
            change("v", lambda x: x[:, :1].expand(-1, 10**6, -1, -1)),
            r"v\.shape=.* from 1 to 999,999",
        ),
    ],
)
def test_what_is_wrong_is_named(wrong, words):
    good = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items()}
    with pytest.raises(UserError, match=words):
        qv_attention(**wrong(good))


@runs
@pytest.mark.parametrize(
    "wrong,words",
    [
        (change("lengths", lambda x: None), r"lengths=None should be a tensor"),
        (change("lengths", lambda x: 3), r"lengths=3 should be a tensor"),
        (
            change("lengths", lambda x: x.float()),
            r"lengths\.dtype=torch\.float32 should be torch\.int32 or torch\.int64",
        ),
        (change("lengths", lambda x: x[:1]), r"lengths\.shape=\(1,\) should be \(B\) .* B=2"),
        (
            change("q", lambda x: x.repeat(1, 2, 1, 1)),
            r"q\.shape=\(2, 2, 4, 16\) should be \(B, T, H, D\) .* T=1",
        ),
        (change("ctx", lambda x: x[:, 1:]), r"ctx\.shape=\(2, 5, 32\) .* S=6"),
        (change("ctx", lambda x: None), r"ctx=None should be a tensor; q_ctx and ctx go together"),
    ],
)
def test_what_is_wrong_in_decoding_is_named(wrong, words):
    good = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items()}
    good |= dict(
        q=good["q"][:, :1], q_ctx=good["q_ctx"][:, :1], lengths=torch.tensor([3, 6], device=DEVICE)
    )
    with pytest.raises(UserError, match=words):
        qv_decode(**wrong(good))


@pytest.mark.skipif(CUDA, reason="needs a machine without CUDA")
@runs
def test_bf16_cannot_be_interpreted():
    q = torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(
        UserError, match=r"q\.dtype=torch\.bfloat16 should be float32 or float16 to be interpreted"
    ):
        qv_attention(q, q)


# In processes of their own, where Triton compiles --------------------------------------------------------------------


REFUSED = """
import runpy, sys, prepare, torch
def refused():
    try:
        x = torch.zeros(1, 1, 1, 16)
        runpy.run_path("kernel.py")["qv_attention"](x, x)
    except prepare.UserError as error:
        print(error)
import triton
refused()
triton.__version__ = "3.2.0"
refused()
sys.modules["triton"] = None
refused()
"""
# A row for every kernel in bf16, for A100 and H100: plain, and with all extras at two widths; with few and with many
# heads to a value; for one token and one head, and for lengths without a factor of 16. How many variants were compiled.
REPORT = """
import json, sys
sys.path.append("tests")
import benchmark, kernel
rows, variants = [], []
for arch in 80, 90:
    for case in (64, 0, False), (64, 128, True), (128, 0, True), (128, 128, True):
        rows += benchmark.compile_report(arch, *case)
    for sizes in dict(T=1, H=1), dict(T=1000, H=12), dict(T=1, H=12):
        rows += benchmark.compile_report(arch, 64, 128, True, **sizes)
    for G in 4, 1:
        rows += benchmark.compile_report(arch, 128, 128, True, T=1000, H=32, G=G, only="decode_kernel")
    variants += [len(f.device_caches[arch][0]) for f in (kernel.forward_kernel, kernel.token_backward_kernel)]
print(json.dumps([rows, variants]))
"""


USAGE = "import runpy, sys; sys.argv = ['kernel.py', '--help']; runpy.run_path('kernel.py', run_name='__main__')"
if kernel.triton:
    BESIDE.update(report=REPORT, refused=REFUSED, help=USAGE)


@compiles
def test_what_cannot_run_is_said(answer):
    """Importing works, calling does not, and nothing else steps in."""
    here, old, without = answer("refused").splitlines()
    assert CUDA or here.startswith("q.device=cpu should be a CUDA device")
    assert old == (
        "the fused kernel needs the package triton, 3.4 or newer, and 3.2.0 is installed; "
        "model.py does without"
    )
    assert "and none is installed" in without


@compiles
def test_the_kernels_own_program_is_the_benchmark(answer):
    assert "usage: kernel.py" in answer("help")


# Compiling for GPUs that need not be there ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(answer):
    return json.loads(answer("report"))


@compiles
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_and_fits(arch, report):
    rows = [row for row in report[0] if row["arch"] == arch]
    assert len(rows) == 7 * 5 + 2 and len({row["kernel"] for row in rows}) == 5
    for row in rows:
        print(*(f"{name}={x}" for name, x in row.items()))
        assert (
            row["shared"] <= (99 if arch == 80 else 227) * 1024
        )  # what a block gets on sm_86 and sm_90
        assert row["spilled"] <= (0 if VERSION >= (3, 9) else 80) and row["registers"] > 0


@compiles
def test_no_length_is_reason_to_compile_anew(report):
    """Four kinds of attention were compiled for each GPU, for 1, 1000 and 1024 tokens, and 1 and 12 heads."""
    assert report[1] == 4 * [4]


@compiles
def test_hopper_multiplies_by_wgmma(report):
    """At least one instruction for each product of tiles, in both loops of a kernel; and several go on at once."""
    products = dict(
        forward_kernel=(2, 3), query_backward_kernel=(3, 5), token_backward_kernel=(4, 6)
    )
    for row in report[0]:
        if row["arch"] == 90 and row["kernel"] in products:
            assert row["wgmma"] >= 2 * products[row["kernel"]][row["d_ctx"] > 0], row
            assert row["waits"] < row["wgmma"] / 2, row


# The benchmark --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """benchmark.py at sizes that the interpreter can compute, with a clock that gives 1, 2, 3 .. milliseconds."""
    benchmark, ticks = importlib.import_module("benchmark"), itertools.count(1)
    changed = dict(
        DEVICE=DEVICE,
        DTYPE=torch.float32,
        H=2,
        D=16,
        TOKENS=64,
        LENGTHS=(16, 64),
        WIDTHS=(0, 16),
        DECODE_H=4,
        DECODE_G=2,
        DECODE_E=16,
        BATCHES=(1, 2),
        CONTEXTS=(24, 70),
        qv_attention=qv_attention,
        qv_decode=qv_decode,
    )
    for name, x in changed.items():
        monkeypatch.setattr(benchmark, name, x)
    monkeypatch.setattr(benchmark, "timed", lambda run: (run(), next(ticks))[1])
    monkeypatch.setattr(
        benchmark, "peak_memory", lambda run: (run(), torch.cuda.memory_allocated() + 2**20)[1]
    )
    monkeypatch.setattr(benchmark, "flex_attention", lambda: flex)  # not compiled, which takes time
    monkeypatch.setattr(benchmark.gc, "collect", lambda *_: None)  # likewise
    return benchmark


def flex(q, k, v, score_mod=None, block_mask=None):
    """What flex_attention returns, with the gradients of the same in plain PyTorch: on the CPU it has none."""
    i, j, h = (torch.arange(size, device=DEVICE) for size in (q.size(2), k.size(2), q.size(1)))
    i = i[:, None]
    s = q @ k.mT / math.sqrt(q.size(-1))
    s = s if score_mod is None else score_mod(s, None, h[:, None, None], i, j)
    s = (
        s
        if block_mask is None
        else s.masked_fill(~block_mask.mask_mod(None, None, i, j), -math.inf)
    )
    out, flex_attention = (
        s.softmax(-1) @ v,
        importlib.import_module("torch.nn.attention.flex_attention").flex_attention,
    )
    detached = [x.detach() for x in (q, k, v)]
    return (
        out + (flex_attention(*detached, score_mod=score_mod, block_mask=block_mask) - out).detach()
    )


@runs
@pytest.mark.parametrize("T", [16, 64])
@pytest.mark.parametrize("E", [0, 16])
@pytest.mark.parametrize("decayed", [False, True])
def test_contestants_compute_the_same(small, T, E, decayed):
    """The outputs and the gradients of all the benchmark times side by side; plain QKV alone has keys of its own."""
    found = small.contestants(T, E, decayed)
    assert [*found] == ["fused", "sdpa", "flex"] + ["qkv"] * (not E and not decayed)
    d_out, first = tensor(64 // T, T, 2, 16), None
    for name, (make, inputs) in found.items():
        out = make()()
        out = out if name == "fused" else out.transpose(1, 2)
        result = [out, *torch.autograd.grad(out, inputs, d_out)]
        first = first or [x.double() for x in result]
        if name != "qkv":
            assert_close(result, first, 1e-5)


@runs
def test_everything_decodes_the_same(small):
    runs = small.attentions_to_decode(2, 70)
    expected, found = runs["flash_attention"].func(SDPBackend.MATH), []
    for name in (name for name in runs if not name.startswith("QV")):
        with contextlib.suppress(RuntimeError):  # the CPU has not all of them
            found.append(runs[name]().transpose(1, 2))
    assert found
    for x in found:
        assert_close([x], [expected.transpose(1, 2).double()], 1e-5)
    assert (
        runs["QV"]().shape == runs["QV-Ka"]().shape == runs["QV, shared"]().shape == (2, 1, 4, 16)
    )


@runs
def test_the_benchmark_from_end_to_end(small, capsys):
    """A line for each shape and contestant; every figure from the made-up clock. Rivals may break."""

    def broken():
        raise NotImplementedError("not today")

    small.qv_attention, small.qv_decode = (
        qv_attention_plain,
        decode_plain,
    )  # quicker than the interpreter
    small.flex_attention = broken
    small.benchmark(seconds=600)
    out = capsys.readouterr().out
    assert out.count("fused ") == out.count("sdpa ") == 2 * 2 * 2 and out.count("qkv ") == 2
    assert "flex: NotImplementedError: not today" in out
    assert (
        "T    16  d_ctx   0  decay no   fused    1.000 ms    0     2.000 ms    0             1 MiB"
        in out
    )
    assert re.search(
        r"^     2      70 +\d+\.\d +\d+% +\d+\.\d +\d+% +\d+\.\d +\d+% +\d+\.\d \(", out, re.M
    )
    small.benchmark(seconds=-1)
    assert not re.search(r"\d ms", capsys.readouterr().out)


@runs
def test_whole_models_are_measured_by_either_kernel(small, capsys, monkeypatch):
    sizes = dict(n_layer=1, n_head=2, n_embd=32, block_size=4, vocab_size=9)
    monkeypatch.setattr(small, "SHAPES", {"small": (2, sizes)})
    monkeypatch.setattr(small, "clock", lambda run: (run(), 0.5)[1])
    monkeypatch.setattr(small, "peak_memory", lambda run: 2**20)
    monkeypatch.setattr(
        small,
        "product",
        lambda *factors: [
            ("small", "qv_ka", pos, name) for pos in ("rope", "agf") for name in ("torch", "triton")
        ],
    )
    monkeypatch.setattr(small, "STEPS", 2)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: contextlib.nullcontext()
    )  # float32 has none
    small.bench_models(600)
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"small qv_ka     {pos:5} {name:6}       0.5     500.0       1.0       6.0"
        for pos in ("rope", "agf")
        for name in ("torch", "triton")
    ]
