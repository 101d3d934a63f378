"""kernel.py against plain PyTorch: on a GPU if there is one, else in Triton's interpreter, which
runs the same kernels on the CPU. test_kernel_compiled.py compiles them."""

import importlib
import math
import weakref
from unittest import mock
from weakref import WeakSet

import pytest
import torch
from conftest import TINY, call, log
from kernel_helpers import (
    CUDA,
    DEVICE,
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_right,
    conditions,  # noqa: F401
    covering,
    double,
    inputs,
    on_cpu,
    on_gpu,
    results,
    runs,
    tensor,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernel
from kernel import attention, attention_plain, decode, decode_plain
from model import GPT, GPTConfig
from prepare import UserError

# Where triton is installed everything here runs. If somebody imported it before kernel_helpers
# asked for the interpreter, all these tests fail, for the CPU is refused.
pytestmark = [
    runs,
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),  # an empty part's sum
]


@on_cpu
def test_triton_was_not_imported_before_its_interpreter_was_asked_for():
    assert kernel.INTERPRETED


# Forward and backward ---------------------------------------------------------


@covering(
    T=[1, 17, 33],
    D=[16, 32, 64, 128],
    keys=[False, True],
    E=[0, 16, 64],
    decay=[False, True],
    scale=[None, 0.1],
    dtype=DTYPES,
    BHG=[(2, 2, 2), (1, 3, 1), (1, 4, 2)],
    past=[0, 1, 15],
    layout=["plain", "gaps", "heads first", "one buffer"],
)
def test_output_and_all_gradients(case):
    scale = case.pop("scale")
    assert_right(inputs(**case), TOLERANCE[case["dtype"]], scale=scale)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("E", [0, 16])
@pytest.mark.parametrize("keys", [False, True])
def test_every_form(keys, E, decay):
    """With heads that share, and in two tiles each way."""
    tensors = inputs(T=20, D=16, keys=keys, E=E, decay=decay, BHG=(1, 2, 1), past=7)
    assert_right(tensors, 1e-5)


@on_cpu
@pytest.mark.parametrize("row", [name for name in kernel.TILES if name != "float32"])
def test_every_way_to_cut_the_scores(row, monkeypatch):
    """The tiles of 16-bit numbers, in float32, where a wrong index cannot pass for rounding."""
    monkeypatch.setitem(kernel.TILES, "float32", kernel.TILES[row])
    keys, E = "wider" in row, 0 if "narrow" in row else 16
    assert_right(inputs(T=141, D=16, keys=keys, E=E, decay=True, past=9, BHG=(1, 2, 1)), 1e-5)


@on_gpu
@covering(
    seed=1,
    T=[511, 1024, 4096],
    D=[16, 32, 64, 128],
    keys=[False, True],
    E=[0, 16, 32, 64, 128],
    decay=[False, True],
    scale=[None, 0.1],
    dtype=list(TOLERANCE),
    past=[0, 77],
)
def test_long_sequences_on_a_gpu(case):
    scale = case.pop("scale")
    assert_right(inputs(**case), TOLERANCE[case["dtype"]], scale=scale)


def test_the_value_as_key():
    """Without k as with a k that is v."""
    q, v = tensor(1, 20, 2, 16), tensor(1, 20, 2, 16)
    torch.testing.assert_close(attention(q, v), attention(q, v, v.clone()))


def test_contexts_are_keys_that_the_heads_share():
    """One query and one key, both 32 wide, in two parts or in one."""
    q, q_ctx, k, ctx = (
        tensor(1, 9, 2, 16),
        tensor(1, 9, 2, 16),
        tensor(1, 9, 2, 16),
        tensor(1, 9, 16),
    )
    v = tensor(1, 9, 2, 16)
    wide_q = torch.cat([q, q_ctx], dim=-1)
    wide_k = torch.cat([k, ctx[:, :, None].expand_as(k)], dim=-1)
    wide_v = torch.cat([v, v], dim=-1)
    found = attention(q, v, k, q_ctx, ctx, scale=32**-0.5)
    torch.testing.assert_close(found, attention(wide_q, wide_v, wide_k)[..., :16])


def test_rows_may_lie_far_apart(tmp_path):
    """2^31 numbers from first to last, in a file that is nearly all hole."""
    size = 16 * 2**27 + 16
    if CUDA:
        far = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        name = str(tmp_path / "hole")
        far = torch.from_file(name, shared=True, size=size, dtype=torch.float16)
    far = far.as_strided((1, 17, 1, 16), (1, 2**27, 16, 1))
    near = far.copy_(tensor(1, 17, 1, 16)).clone()
    assert torch.equal(attention(far, far), attention(near, near))
    last, lengths = near[:, :1], torch.tensor([17], device=DEVICE)
    found, expected = (decode(last, x, lengths=lengths) for x in (far, near))
    assert torch.equal(found, expected)


def test_the_same_bits_every_time():
    tensors = inputs(T=17, D=16, keys=True, E=16, decay=True, BHG=(1, 2, 1))
    d_out = tensor(1, 17, 2, 16)
    first, second = (results(attention, tensors, d_out) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_future_does_not_matter():
    tensors = {name: x.detach() for name, x in inputs(T=30, D=16, keys=True, E=16).items()}
    before = attention(**tensors)
    for name in "v", "k", "ctx":
        tensors[name][:, 23:] = 1e4
    after = attention(**tensors)
    assert torch.equal(before[:, :23], after[:, :23])
    assert not torch.equal(before[:, 23:], after[:, 23:])


@pytest.mark.parametrize("size", [1e-4, 30.0, 3000.0])
def test_scores_of_any_size(size):
    tensors = inputs(T=19, D=16)
    tensors["q"] = (tensors["q"].detach() * size).requires_grad_()
    d_out = tensor(1, 19, 2, 16)
    found = results(attention, tensors, d_out)
    expected = results(attention_plain, double(tensors), d_out)
    # Of scores of 10^4, exp keeps three digits.
    tolerance = 2e-3 if size > 1000 else 1e-5
    assert_close({"output": found["output"]}, {"output": expected["output"]}, tolerance)
    assert all(x.isfinite().all() for x in found.values())


# An operator like any other ---------------------------------------------------

EVERYTHING = dict(T=17, D=16, keys=True, E=16, decay=True)


@pytest.mark.parametrize("form", [EVERYTHING, dict(T=20, D=16)])
def test_schema_fakes_and_gradients_are_as_torch_compile_expects(form):
    tensors = inputs(**form)
    names = "q", "v", "k", "q_ctx", "ctx", "decay"
    args = *(tensors.get(name) for name in names), 0.25
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(kernel.attention_op, args, test_utils=checks)
    # The logarithm of the sums has no gradient.
    (d_q,) = torch.autograd.grad(kernel.attention_op(*args)[0].sum(), tensors["q"])
    assert d_q.isfinite().all()


def doubled(**tensors):
    return 2 * attention(**tensors)


def test_compiled_it_is_the_same_without_a_break_in_the_graph():
    tensors, d_out = inputs(**EVERYTHING), tensor(1, 17, 2, 16)
    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    expected, found = (results(function, tensors, d_out) for function in (doubled, compiled))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpointed_it_is_the_same():
    """A checkpoint computes outputs again in the backward pass."""
    tensors, d_out = inputs(**EVERYTHING), tensor(1, 17, 2, 16)

    def checkpointed(**tensors):
        return checkpoint(doubled, **tensors, use_reentrant=False)

    expected, found = (results(function, tensors, d_out) for function in (doubled, checkpointed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_decoding_compiles_without_a_break_in_the_graph():
    q, v, lengths = tensor(1, 1, 2, 16), tensor(1, 20, 2, 16), torch.tensor([20], device=DEVICE)
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, v, lengths=lengths), decode(q, v, lengths=lengths))


def decode_fifth(q, v):
    return decode(q[:, -1:], v, lengths=torch.full((1,), 5, device=q.device))


@pytest.mark.parametrize("function", [attention, decode_fifth])
def test_other_lengths_take_no_other_graph(function):
    """torch.compile takes the first length for a constant, the second for a variable, and any
    other as that one."""
    torch.compiler.reset()
    # This imports triton: too early above.
    counter = importlib.import_module("torch._dynamo.testing").CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for T in 5, 6, 7, 9, 12:
        q, v = tensor(1, T, 2, 16), tensor(1, T, 2, 16)
        assert torch.equal(compiled(q, v), function(q, v))
    assert counter.frame_count == 2


class Memory(TorchDispatchMode):
    """Counts the bytes of what is made under it, `now` and `peak`, and keeps the names of
    functions that make it."""

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


def test_gradient_of_a_plain_sum():
    """sum() hands down a gradient that is one number, of stride 0; and nobody makes zeros for the
    logarithm of the sums, which has no gradient."""
    tensors = inputs(T=17, D=16)
    total = attention(**tensors).sum()
    with Memory() as memory:
        total.backward()
    (d_v,) = torch.autograd.grad(attention_plain(**tensors).sum(), tensors["v"])
    torch.testing.assert_close(tensors["v"].grad, d_v)
    assert not any("zeros" in name for name in memory.functions)


@pytest.mark.parametrize(
    "keys,E,G", [(False, 0, 12), (False, 128, 12), (True, 0, 12), (True, 32, 12), (False, 64, 3)]
)
def test_backward_has_room_for_little_but_the_gradients(keys, E, G):
    """What each head wants of the context has the size of q_ctx's gradient, and has to be gone
    before that is made."""
    made = inputs(T=128, D=64, keys=keys, E=E, decay=True, BHG=(1, 12, G), dtype=torch.float16)
    tensors = [made.get(name) for name in ("q", "v", "k", "q_ctx", "ctx", "decay")]
    d_out = torch.ones_like(made["q"])

    def nothing(*args, **constants):
        pass

    with torch.no_grad(), Memory() as memory:
        out, lse = kernel.run_forward(*tensors, scale=0.125, launch=nothing)
        gradients = kernel.run_backward(d_out, *tensors, out, lse, scale=0.125, launch=nothing)
    kept = out.nbytes + lse.nbytes + sum(x.nbytes for x in gradients)
    assert kept <= memory.now and memory.peak < 1.05 * kept


# Decoding ---------------------------------------------------------------------


@covering(
    lengths=[None, (64, 1), (90, 7, 130)],
    D=[16, 32, 64, 128],
    E=[0, 16, 64],
    decay=[False, True],
    dtype=DTYPES,
    HG=[(1, 1), (6, 6), (16, 8), (20, 1)],
    layout=["plain", "gaps", "heads first", "one buffer"],
    index=[torch.int32, torch.int64],
)
def test_decoding(case):
    """A full cache of 130 tokens, or ragged sequences in it and the rest NaN; up to 20 heads that
    ask one value."""
    lengths, index = case.pop("lengths"), case.pop("index")
    B = 1 if lengths is None else len(lengths)
    tensors = inputs(T=1, BHG=(B, *case.pop("HG")), past=129, **case)
    tensors = {name: x.detach() for name, x in tensors.items()}
    if lengths is not None:
        for b, n in enumerate(lengths):
            for name in {"v", "ctx"} & tensors.keys():
                tensors[name][b, n:] = math.nan
        lengths = torch.tensor(lengths, dtype=index, device=DEVICE)
    found = decode(**tensors, lengths=lengths)
    expected = decode_plain(**double(tensors), lengths=lengths)
    assert_close({"output": found}, {"output": expected}, TOLERANCE[case["dtype"]])
    assert torch.equal(found, decode(**tensors, lengths=lengths))


@pytest.mark.parametrize("n_split", [1, 2, 7, 64])
def test_decoding_in_any_number_of_parts(n_split, monkeypatch):
    """Most of 64 are empty."""
    monkeypatch.setattr(kernel, "parts", lambda programs, tiles, at_once: n_split)
    q, v = tensor(2, 1, 2, 16), tensor(2, 400, 2, 16)
    lengths = torch.tensor([400, 17], device=DEVICE)
    found, expected = (f(q, v, lengths=lengths) for f in (decode, decode_plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "programs,tiles,expected",
    [
        (396, 64, 1),  # one wave as it is
        (1, 4, 4),  # a part for each tile
        (64, 64, 6),  # 384 programs: as many as fit one wave
        (512, 64, 3),  # 3.9 waves, and not 2.6, which take the time of three
    ],
)
def test_decoding_fills_whole_waves(programs, tiles, expected):
    assert kernel.parts(programs, tiles, at_once=396) == expected


# In the model -----------------------------------------------------------------

POSITIONS = "learned", "sinusoidal", "rope", "agf", "rope+agf"
USES = [
    dict(attention=x, pos=pos) for x in ("qkv", "gqa", "mla", "qv", "qv_ka") for pos in POSITIONS
]
USES += [
    dict(attention="qkv", pos="rope+agf", rope_values=True),
    dict(attention="gqa", pos="rope", rope_values=True),
    dict(attention="qv", pos="rope+agf", n_kv_head=1),
    dict(attention="qv_ka", pos="agf", n_kv_head=1),
    dict(attention="qv_ka", pos="rope+agf", wk="shared"),
    dict(attention="qv_ka", pos="learned", wk="diagonal"),
    dict(attention="qv_ka", pos="rope+agf", wk="diagonal"),
]


def models(options):
    """Two models with the same weights: by PyTorch, and by the kernel."""
    sizes = dict(n_layer=1, n_head=2, n_embd=32, block_size=20)
    if options["attention"] == "mla":
        sizes |= dict(d_rope=16, d_latent=24)
    if options["attention"] == "qv_ka":
        sizes |= dict(d_ctx=16)
    config = GPTConfig(**sizes | options)
    plain, fused = GPT(config).to(DEVICE), GPT(config).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    fused.use_kernel()
    return plain, fused


def names(options):
    return " ".join(f"{name}={x}" for name, x in options.items())


def assert_learn_the_same(a, b, losses):
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for (name, x), y in zip(a.named_parameters(), b.parameters()):
        assert (x.grad - y.grad).norm() < 1e-4 * x.grad.norm(), name


@pytest.mark.parametrize("options", USES, ids=names)
def test_a_model_learns_the_same_by_either(options):
    plain, fused = models(options)
    x, y = torch.randint(65, (2, 1, 18), device=DEVICE)
    with mock.patch.object(kernel, "attention", wraps=attention) as used:
        losses = [model(x, y)[1] for model in (plain, fused)]
    assert used.call_count == 1, "once a layer, and not at all by PyTorch"
    assert_learn_the_same(plain, fused, losses)


@pytest.mark.parametrize("options", USES, ids=names)
def test_a_model_generates_the_same_by_either(options):
    """A prompt of several tokens, decoding from the cache's buffers as they lie, and a context that
    runs full. Keys, where a token leaves one behind, are met by PyTorch."""
    plain, fused = (model.eval() for model in models(options))
    prompt = torch.randint(65, (2, 15), device=DEVICE)
    with mock.patch.object(kernel, "decode", wraps=decode) as used:
        texts = [
            torch.cat([*model.generate(prompt, 8, temperature=0)], 1) for model in (plain, fused)
        ]
    assert torch.equal(*texts)
    assert used.called == (options["attention"] in ("qv", "qv_ka"))
    if used.called:
        v = used.call_args.args[1]
        assert v.size(1) < 20 and v.stride(0) == 20 * v.stride(1), "the cache's buffer, not a copy"


@pytest.mark.parametrize("options", [USES[19], USES[-1]], ids=names)
def test_a_prompt_in_pieces_gives_the_same_logits_by_either(options):
    logits = []
    prompt = torch.randint(65, (2, 18), device=DEVICE)
    for model in models(options):
        cache = model.eval().new_cache()
        pieces = prompt[:, :9], prompt[:, 9:17], prompt[:, 17:]
        with torch.no_grad():
            logits.append(torch.cat([model(piece, cache=cache)[0] for piece in pieces], 1))
    torch.testing.assert_close(*logits)


def test_a_compiled_model_takes_the_kernel_whole():
    """torch.compile sees one operator in the kernel's place: no graph break, and the same loss and
    gradients."""
    options = dict(attention="qv_ka", pos="rope+agf")
    eager, compiled = models(options)[1], models(options)[1]
    compiled.load_state_dict(eager.state_dict())
    x, y = torch.randint(65, (2, 1, 18), device=DEVICE)
    whole = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    assert_learn_the_same(eager, compiled, [eager(x, y)[1], whole(x, y)[1]])


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(attention="qv", pos="rope", dropout=0.1), "no dropout of attention weights"),
        (dict(attention="qkv", pos="agf", n_head=4), "q.shape=.* with D 16, 32, 64 or 128"),
        (dict(attention="mla", pos="rope", d_rope=8), "q_ctx.shape=.* with E 16, 32, 64 or 128"),
    ],
)
def test_what_the_kernel_cannot_do_for_a_model_is_a_sentence(options, words):
    fused = models(options)[1]
    x = torch.randint(65, (1, 18), device=DEVICE)
    with pytest.raises((ValueError, UserError), match=words):
        fused(x, x)


@on_gpu
@pytest.mark.parametrize("attention,pos", [("qv", "agf"), ("qv_ka", "rope+agf"), ("mla", "rope")])
def test_200_steps_of_training_follow_pytorch(attention, pos):
    """In bfloat16, from the same weights and batches; float32 in PyTorch says how far bfloat16
    alone moves losses."""
    sizes = dict(n_layer=4, n_head=4, n_embd=256, block_size=256)
    if attention == "qv_ka":
        sizes |= dict(d_ctx=64)
    config = GPTConfig(attention=attention, pos=pos, **sizes)
    models = [GPT(config).to(DEVICE) for _ in range(3)]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    models[2].use_kernel()
    text = torch.randint(65, (20_000,), device=DEVICE) // 2 * 2  # something to learn: even tokens
    losses = []
    for model, dtype in zip(models, (torch.float32, torch.bfloat16, torch.bfloat16)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        random = torch.Generator().manual_seed(1)
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
    noise, error = (plain - exact).abs().mean(), (fused - exact).abs().mean()
    assert error < 2 * noise + 1e-4, f"{error:.2e} against {noise:.2e}"


@runs
def test_the_programs_take_the_kernel_and_say_so(folder, capsys):
    shape = ["--n_embd=32", "--max_steps=2", "--eval_tokens=64", "--dtype=float32"]
    losses = []
    for name in "torch", "triton":
        options = [f"--kernel={name}", f"--out=out/{name}", f"--device={DEVICE}"]
        assert call("train", *TINY, *shape, *options) is None
        assert f"attention by {name}" in capsys.readouterr().out
        assert call("sample", *options, "--prompt=wall", "--max_new_tokens=3") is None
        assert f"attention by {name}" in capsys.readouterr().err
        losses.append(log(f"out/{name}")[-1]["val_loss_part"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@runs
@pytest.mark.parametrize(
    "flags,words",
    [
        (["--n_embd=32", "--dropout=0.1"], "has no dropout of attention weights"),
        (["--n_embd=16"], "with D 16, 32, 64 or 128"),
        (["--n_embd=32", "--attention=mla", "--d_rope=8"], "with E 16, 32, 64 or 128"),
    ],
)
def test_what_the_kernel_cannot_do_is_a_sentence(folder, flags, words):
    sentence = call("train", *TINY, "--kernel=triton", f"--device={DEVICE}", *flags)
    assert words in sentence and "take --kernel=torch" in sentence


# What is refused --------------------------------------------------------------

GOOD = dict(
    q=(2, 4, 4, 16),
    v=(2, 6, 2, 16),
    k=(2, 6, 2, 16),
    q_ctx=(2, 4, 4, 32),
    ctx=(2, 6, 32),
    decay=(4,),
)


def change(name, function):
    return lambda x: x | {name: function(x[name])}


def every_second(x):
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize(
    "wrong,words",
    [
        (change("q", lambda x: x.double()), r"q\.dtype=torch\.float64: .* torch\.float32 or"),
        (change("v", lambda x: x.half()), r"v\.dtype=torch\.float16: it should be torch\.float32"),
        (change("k", lambda x: x.half()), r"k\.dtype=torch\.float16: it should be torch\.float32"),
        (change("ctx", lambda x: x.half()), r"ctx\.dtype=torch\.float16: .* torch\.float32"),
        (change("decay", lambda x: x.long()), r"decay\.dtype=torch\.int64"),
        (change("q", lambda x: x[0]), r"q\.shape=\(4, 4, 16\): it should be \(B, T, H, D\)"),
        (change("q", lambda x: x[..., :15]), r"q\.shape=.* with D 16, 32, 64 or 128"),
        (change("q", lambda x: x[:, :0]), r"q\.shape=\(2, 0, 4, 16\): .* with T from 1 to 999,999"),
        (change("v", lambda x: x[:1]), r"v\.shape=\(1, 6, 2, 16\): .* \(B, S, G, D\) with B 2"),
        (change("v", lambda x: x[:, :, :0]), r"v\.shape=\(2, 6, 0, 16\): .* with G from 1"),
        (change("v", lambda x: x.repeat(1, 1, 1, 2)), r"v\.shape=.* with D 16"),
        (change("v", lambda x: x[:, :1].expand(-1, 10**6, -1, -1)), r"with S from 1 to 999,999"),
        (change("k", lambda x: x[:, :, :1]), r"k\.shape=\(2, 6, 1, 16\): .* with G 2"),
        (change("k", lambda x: x[:, :5]), r"k\.shape=\(2, 5, 2, 16\): .* with S 6"),
        (change("q_ctx", lambda x: x[:, :2]), r"q_ctx\.shape=.* with T 4"),
        (change("q_ctx", lambda x: x[..., :8]), r"q_ctx\.shape=.* with E 16, 32, 64 or 128"),
        (change("ctx", lambda x: x[:, :5]), r"ctx\.shape=\(2, 5, 32\): .* with S 6"),
        (change("ctx", lambda x: x[..., :16]), r"ctx\.shape=.* with E 32"),
        (change("decay", lambda x: x[:2]), r"decay\.shape=\(2,\): it should be \(H\) with H 4"),
        (change("q", every_second), r"q\.stride\(\)=.* should be 1 at the end"),
        (change("ctx", every_second), r"ctx\.stride\(\)=.* should be 1 at the end"),
        (change("ctx", lambda x: None), r"ctx=None: .* a tensor, as q_ctx and ctx go together"),
        (change("q_ctx", lambda x: None), r"q_ctx=None: .* a tensor, as q_ctx and ctx go together"),
        (change("v", lambda x: None), r"v=None: it should be a tensor"),
        (change("decay", lambda x: 1.0), r"decay=1\.0: it should be a tensor"),
        (change("ctx", lambda x: x.to("meta")), r"ctx\.device=meta: it should be (cpu|cuda:0)"),
        (lambda x: x | dict(scale=0.0), r"scale=0\.0: it should be a number above 0"),
    ],
)
def test_what_is_wrong_is_named(wrong, words):
    good = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items()}
    with pytest.raises(ValueError, match=words):
        attention(**wrong(good))


@pytest.mark.parametrize(
    "G,words", [(8, "G=8: .* a divisor of H=4"), (3, "G=3: .* a divisor of H=4")]
)
def test_value_heads_that_do_not_divide_the_heads_are_named(G, words):
    q, v = torch.zeros(2, 4, 4, 16, device=DEVICE), torch.zeros(2, 6, G, 16, device=DEVICE)
    with pytest.raises(ValueError, match=words):
        attention(q, v)


def test_more_queries_than_tokens_are_named():
    q, v = torch.zeros(2, 4, 4, 16, device=DEVICE), torch.zeros(2, 3, 4, 16, device=DEVICE)
    with pytest.raises(ValueError, match="S=3: it should be at least T=4"):
        attention(q, v)


@pytest.mark.parametrize(
    "wrong,words",
    [
        (change("lengths", lambda x: 3), r"lengths=3: it should be a tensor"),
        (change("lengths", lambda x: x.float()), r"lengths\.dtype=.* torch\.int32 or torch\.int64"),
        (change("lengths", lambda x: x[:1]), r"lengths\.shape=\(1,\): .* \(B\) with B 2"),
        (change("q", lambda x: x.repeat(1, 2, 1, 1)), r"q\.shape=\(2, 2, 4, 16\): .* with T 1"),
        (change("ctx", lambda x: x[:, 1:]), r"ctx\.shape=\(2, 5, 32\): .* with S 6"),
        (change("ctx", lambda x: None), r"ctx=None: .* q_ctx and ctx go together"),
    ],
)
def test_what_is_wrong_in_decoding_is_named(wrong, words):
    good = {name: torch.zeros(shape, device=DEVICE) for name, shape in GOOD.items() if name != "k"}
    good |= dict(q=good["q"][:, :1], q_ctx=good["q_ctx"][:, :1])
    good |= dict(lengths=torch.tensor([3, 6], device=DEVICE))
    with pytest.raises(ValueError, match=words):
        decode(**wrong(good))


@on_cpu
def test_bfloat16_cannot_be_interpreted():
    q = torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"q\.dtype=torch\.bfloat16: .* to be interpreted"):
        attention(q, q)


@pytest.mark.parametrize("hip,capability", [("6.4", (9, 4)), (None, (7, 5))])
def test_other_gpus_are_refused(hip, capability, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the card")
    words = "needs an NVIDIA GPU of compute capability 8.0 .* and this is the card"
    with pytest.raises(ValueError, match=words):
        kernel.launch(None, (1,), mock.Mock(is_cuda=True))
