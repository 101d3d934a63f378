"""model.py against the paper's formulas, its own table, and itself: every attention with every kind of positions."""

import math
import re
import sys
import types
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_py
from model import ATTENTIONS, GPT, POSITIONS, QV, Cache, GPTConfig

# Every attention, and with values, or keys and values, that heads share. A test's `attention` is one of these names.
VARIANTS = {name: dict(attention=name) for name in ATTENTIONS} | {
    f"{name}/{G}": dict(attention=name, n_kv_head=G)
    for name, G in (("gqa", 1), ("qv", 1), ("qv", 2), ("qv_ka", 1), ("qv_ka", 2))
}
CASES = pytest.mark.parametrize("attention,pos", list(product(VARIANTS, POSITIONS)))
ONCE = pytest.mark.parametrize(
    "attention,pos", list(zip(VARIANTS, 3 * POSITIONS))
)  # each somewhere, for slow tests
SMALL = dict(block_size=24, vocab_size=31, n_layer=2, n_head=4, n_embd=32)


def config(variant, pos, **changes):
    return GPTConfig(
        pos=pos, **{**SMALL, **VARIANTS.get(variant, dict(attention=variant)), **changes}
    )


def small(attention, pos, **changes):
    """A small model in float64, in which only mistakes make a difference of 1e-10."""
    torch.manual_seed(0)
    return GPT(config(attention, pos, **changes)).double().eval()


def tokens(*shape, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def logits(model, idx):
    """Logits at every position, without a cache."""
    return model(idx, idx)[0]


def cached_logits(model, idx, chunks):
    """The same, reading idx in chunks of these sizes into a cache."""
    cache = model.new_cache()
    return torch.cat(
        [model(part, part, cache=cache)[0] for part in idx.split(chunks, dim=1)], dim=1
    )


# What it computes -----------------------------------------------------------------------------------------------------


def turned(x, by):
    """RoPE on x (..., width) by complex numbers: pair k of what stands at `by` (...) times exp(i by theta_k)."""
    theta = 10000.0 ** (-torch.arange(0, x.size(-1), 2).double() / x.size(-1))
    angle = by[..., None] * theta
    rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def textbook(attention, x, pos):
    """y_i = sum_j softmax_j(q_i . k_j / sqrt(D) - a log(1 + i - j)) v_j, from the table and pair by pair of positions:
    x (T, C) to (T, C). Under RoPE whatever is remembered of token j reaches token i turned by j - i."""
    a, name, T = attention, type(attention).__name__, len(x)
    if name not in ("QKV", "MLA", "QV", "QVKa"):
        pytest.skip(f"no formula for {name} here; write one")
    H, D = a.n_head, a.d_head
    distance = (torch.arange(T) - torch.arange(T)[:, None]).double()  # (T, T): j - i
    arrives = lambda m: (
        turned(m.expand(T, *m.shape), distance[..., None])
        if pos == "rope"
        else m.expand(T, *m.shape)
    )
    every_head = lambda m: m.repeat_interleave(H // m.size(-2), dim=-2)
    q = (x @ a.q.weight.T).unflatten(-1, (H, -1))  # (i, h, d); k and v: (i, j, h, d)
    if name == "MLA":
        L, R = a.widths
        c, r = (x @ a.down.weight.T).split([L, R], dim=-1)
        c = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        k, v = (torch.einsum("jl,hld->jhd", c, up).expand(T, -1, -1, -1) for up in (a.up_k, a.up_v))
        k = torch.cat([k, every_head(arrives(r[:, None]))], dim=-1)
    else:
        v = (x @ a.v.weight.T).unflatten(-1, (-1, D))  # (j, g, d)
        if name == "QKV":
            k, v = (
                every_head(arrives((x @ a.k.weight.T).unflatten(-1, (-1, D)))),
                every_head(v.expand(T, -1, -1, -1)),
            )
        else:
            k = v = every_head(arrives(v))
        if name == "QVKa":  # K = [G ; V] W_K
            g = arrives(
                (x @ a.ctx.weight.T).unflatten(-1, (-1, D))
                if pos == "rope"
                else (x @ a.ctx.weight.T)[:, None]
            )
            g = every_head(g.flatten(2)[:, :, None])  # under rope, pieces of head width
            k = torch.einsum("ijhe,hed->ijhd", torch.cat([g, v], dim=-1), a.w_k.expand(H, -1, -1))
    weight = (torch.einsum("ihd,ijhd->hij", q, k) / math.sqrt(q.size(-1))).exp()
    if pos == "agf":
        weight = weight * (1 + distance.abs()) ** -a.decay.log_a.exp()[:, None, None]
    weight = weight.tril()
    y = torch.einsum("hij,ijhd->ihd", weight / weight.sum(-1, keepdim=True), v)
    return y.flatten(1) @ a.out.weight.T


@CASES
def test_attention_is_the_textbooks(attention, pos):
    module = small(attention, pos).blocks[0].attention
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(2)).double()
    tolerance = 1e-6 if pos in ("rope", "agf") else 1e-10  # their tables are kept in float32
    expected = torch.stack([textbook(module, row, pos) for row in x])
    torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance)


@CASES
def test_cached_is_full(attention, pos):
    """However the tokens come: one by one, in ragged chunks, or a prompt and one more."""
    model, idx = small(attention, pos), tokens(3, 24)
    for chunks in [1] * 24, [7, 1, 1, 9, 2, 4], [23, 1]:
        torch.testing.assert_close(
            cached_logits(model, idx, chunks), logits(model, idx), rtol=1e-10, atol=1e-12
        )


@CASES
def test_causal(attention, pos):
    model, idx = small(attention, pos), tokens(1, 24)
    changed = idx.clone()
    changed[0, 13] = (changed[0, 13] + 1) % 31
    before, after = logits(model, idx), logits(model, changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:] != after[:, 13:]).any(dim=-1).all(), "a later token must see the change"


@CASES
def test_gradient_reaches_every_parameter(attention, pos):
    model, idx = small(attention, pos), tokens(2, 24)
    model(idx, idx.roll(-1, dims=1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


# Identities -----------------------------------------------------------------------------------------------------------


def same_functions(one, other, idx=None):
    idx = tokens(2, 24) if idx is None else idx
    torch.testing.assert_close(logits(one, idx), logits(other, idx), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        cached_logits(one, idx, [5, 1, 18]), logits(other, idx), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("pos", POSITIONS)
def test_gqa_with_a_group_a_head_is_qkv(pos):
    qkv, gqa = small("qkv", pos), small("gqa", pos, n_kv_head=4)
    gqa.load_state_dict(qkv.state_dict())
    same_functions(qkv, gqa)


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "agf"])  # rope rotates no values of QKV
@pytest.mark.parametrize("G", [1, 2, 4])
def test_qv_is_gqa_whose_key_is_its_value(pos, G):
    gqa, qv = small("gqa", pos, n_kv_head=G), small("qv", pos, n_kv_head=G)
    state = gqa.state_dict()
    for name in [name for name in state if name.endswith("attention.k.weight")]:
        state[name] = state[name.replace(".k.", ".v.")]
    gqa.load_state_dict(state)
    qv.load_state_dict(
        {name: value for name, value in state.items() if not name.endswith("attention.k.weight")}
    )
    same_functions(gqa, qv)


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("G", [1, 4])
def test_qv_ka_that_ignores_the_context_is_qv(pos, G):
    qv, qv_ka = small("qv", pos, n_kv_head=G), small("qv_ka", pos, n_kv_head=G)
    qv_ka.load_state_dict(qv.state_dict(), strict=False)
    for block in qv_ka.blocks:
        block.attention.w_k.data = (
            torch.cat([torch.zeros(16, 8), torch.eye(8)]).double().expand(4, -1, -1).clone()
        )
    same_functions(qv, qv_ka)


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("attention", ["qv", "qv_ka"])
def test_shared_values_are_equal_values(attention, pos):
    """G values that serve H / G heads each are H values of which some are equal."""
    shared, full = small(attention, pos, n_kv_head=2), small(attention, pos)
    state = {
        name: w.unflatten(0, (2, 1, 8)).expand(-1, 2, -1, -1).flatten(0, 2) if ".v." in name else w
        for name, w in shared.state_dict().items()
    }
    full.load_state_dict(state)
    same_functions(shared, full)


@pytest.mark.parametrize("pos", POSITIONS)
def test_shared_wk_is_every_heads_wk(pos):
    shared, per_head = small("qv_ka", pos, shared_wk=True), small("qv_ka", pos)
    state = {
        name: w.expand(4, -1, -1) if name.endswith("w_k") else w
        for name, w in shared.state_dict().items()
    }
    per_head.load_state_dict(state)
    same_functions(shared, per_head)


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("attention", ["gqa", "mla", "qv_ka"])
def test_other_widths(attention, pos):
    d_ctx = 48 if pos == "rope" else 10
    model = small(
        attention, pos, n_kv_head=1, d_latent=5, d_rope=6, d_ctx=d_ctx, n_inner=17, n_head=2
    )
    same_functions(model, model)


# The cache ------------------------------------------------------------------------------------------------------------


def table(text):
    """The last column of the table of attentions: {name: numbers remembered per token and layer}."""
    row = r"^[ |]*`?(qkv|gqa|mla|qv_ka|qv)`?[ |].*?(?:  |\| )((?:2 )?[GH] D(?: \+ d_ctx)?|d_latent \(.*?\))[ |]*$"
    return dict(re.findall(row, text, re.M))


def numbers(formula, config):
    """The value of such a column: terms with + between, factors with blanks."""
    values = dict(
        H=config.n_head,
        G=config.n_kv_head,
        D=config.n_embd // config.n_head,
        d_ctx=config.d_ctx,
        d_latent=config.d_latent,
        d_rope=config.d_rope if config.pos == "rope" else 0,
    )
    terms = re.sub(r"[()]|under rope", "", formula).split("+")
    return sum(
        math.prod(values[x] if x in values else int(x) for x in term.split()) for term in terms
    )


@CASES
def test_cache_takes_what_the_tables_say(attention, pos):
    model = small(attention, pos).float()
    cache = model.new_cache()
    assert [(layer.length, layer.buffers) for layer in cache] == [(0, ())] * 2
    model(tokens(2, 7), cache=cache)
    model(tokens(2, 1), cache=cache)
    assert [layer.length for layer in cache] == [8, 8]
    nbytes = sum(buffer.nbytes for layer in cache for buffer in layer.buffers)
    per_token = nbytes / (2 * 2 * 24 * 4)  # sequences, layers, tokens, bytes
    assert model.cache_bytes() == (2 * 24 * 4 * per_token, 2 * 4 * per_token)
    if attention.split("/")[0] not in table(model_py.__doc__):
        pytest.skip(f"the tables do not list {attention}; add it")
    for text in model_py.__doc__, (Path(__file__).parents[1] / "README.md").read_text():
        assert per_token == numbers(table(text)[attention.split("/")[0]], model.config)


def test_cache_ends_with_the_context():
    model = small("qv_ka", "agf")
    cache = model.new_cache()
    model(tokens(1, 24), cache=cache)
    with pytest.raises(ValueError, match=r"24 \+ 1 tokens .* block_size=24"):
        model(tokens(1, 1), cache=cache)


# Generation -----------------------------------------------------------------------------------------------------------


def generated(model, idx, count, **options):
    torch.manual_seed(3)
    return torch.cat(list(model.generate(idx, count, **options)), dim=1)


@CASES
def test_generation_needs_no_cache_and_knows_no_end(attention, pos):
    """From a prompt of one token, of a whole context, or of more: by turns."""
    model, idx = small(attention, pos), tokens(2, [1, 24, 40][(len(attention) + len(pos)) % 3])
    new = generated(model, idx, 60)
    assert new.shape == (2, 60)
    assert torch.equal(new, generated(model, idx, 60, use_cache=False))
    window, draws = idx, []  # the stated policy, spelt out
    torch.manual_seed(3)
    for token in new.T[:, :, None]:
        window = window[:, -12:] if window.size(1) > 24 else window
        draws.append(torch.multinomial(model(window)[0][:, -1].float().softmax(-1), 1))
        window = torch.cat([window, token], dim=1)
    assert torch.equal(new, torch.cat(draws, dim=1))


class Conversions(TorchDispatchMode):
    """Counts conversions of matrices to bfloat16."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].dim() == 2 and kwargs["dtype"] == torch.bfloat16
        return function(*args, **(kwargs or {}))


@CASES
def test_bfloat16_converts_each_matrix_once(attention, pos):
    """... in a generation, not in each of its steps; and the cache is in bfloat16, half as large."""
    model = GPT(config(attention, pos)).eval()
    with torch.autocast("cpu", torch.bfloat16), Conversions() as conversions:
        counts = [conversions.count for _ in model.generate(tokens(1, 3), 6)]
        halved = model.cache_bytes()
    assert counts[1] == counts[-1] > 0
    assert [2 * nbytes for nbytes in halved] == [*model.cache_bytes()]


@CASES
def test_bfloat16_is_near_float32(attention, pos):
    """An attention's output under autocast: reading 200 tokens at once, or 199 and one more from the cache."""
    torch.manual_seed(6)
    module = GPT(config(attention, pos, block_size=200, n_embd=64)).blocks[0].attention.eval()
    x = torch.randn(2, 200, 64)
    with torch.no_grad():
        exact, cache = module(x), Cache(200)
        with torch.autocast("cpu", torch.bfloat16):
            found = (
                module(x),
                torch.cat([module(x[:, :199], 0, cache), module(x[:, 199:], 199, cache)], dim=1),
            )
    for y in found:
        assert (y - exact).norm() < 0.012 * exact.norm()
        assert (y - exact)[:, -1].norm() < 0.012 * exact[:, -1].norm()


@pytest.mark.parametrize("attention", ["qkv", "qv/1", "qv_ka/1", "mla"])
@pytest.mark.parametrize("T", [1, 40])
def test_bfloat16_does_not_round_the_decay(attention, T):
    """With queries of 0, weights are the power law alone; to round a log(1 + r) = 58 would move some by a tenth."""
    module = GPT(config(attention, "agf", block_size=40)).blocks[0].attention.eval()
    module.q.weight.data.zero_()
    module.decay.log_a.data.fill_(math.log(16.0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        memory = module.write(torch.randn(1, 40, 32), 0)
        q = module.query(torch.randn(1, T, 32), 40 - T)
        folded = attention == "mla" and T == 1  # its memory is key and value
        q, k, v, *score = (q, *memory, *memory) if folded else module.read(q, memory)
        identity = torch.eye(40).type_as(v)[None, :, None].expand(-1, -1, v.size(2), -1)
        weights = module.attend(q, k, identity, *score).double()  # (1, T, H, 40)
    power = (1 + (torch.arange(40 - T, 40)[:, None] - torch.arange(40))).clamp(
        min=0
    ).double() ** -16.0
    power = power.masked_fill(power.isinf(), 0)
    expected = (power / power.sum(-1, keepdim=True))[:, None].expand(T, 4, 40)
    torch.testing.assert_close(weights[0], expected, rtol=0.01, atol=1e-30)


def test_bfloat16_does_not_round_the_contexts_score():
    module = GPT(config("qv_ka", "learned")).blocks[0].attention
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        memory, q = module.write(torch.randn(2, 20, 32), 0), module.query(torch.randn(2, 1, 32), 19)
        *_, score = module.read(q, memory)
    q_ctx = (
        module.scale * q[:, 0, :, : module.d_ctx]
    )  # in bfloat16: the scale is rarely a power of 2
    expected = torch.einsum("bhe,bse->bhs", q_ctx.double(), memory[1].double())[:, :, None]
    assert q.dtype == memory[1].dtype == torch.bfloat16 and score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["qkv", "mla", "qv_ka"])
def test_one_graph_for_all_lengths(attention):
    """torch.compile takes the first length for a constant, the second for a variable, and any other as that one."""
    torch.compiler.reset()
    from torch._dynamo.testing import (
        CompileCounter,
    )  # imports triton, which test_kernel.py has to do first

    model, counter = small(attention, "learned"), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for T in 5, 6, 7, 9, 12:
        assert torch.equal(logits(compiled, tokens(2, T)), logits(model, tokens(2, T)))
    assert counter.frame_count == 2


def test_temperature_and_top_k():
    model, idx = small("qv_ka", "rope"), tokens(4, 5)
    likeliest = model(idx)[0][:, -1].argmax(-1, keepdim=True)
    assert torch.equal(generated(model, idx, 1, temperature=0), likeliest)
    assert all(
        torch.equal(generated(model, idx, 1, temperature=low), likeliest) for low in (1e-45, 1e-300)
    )
    assert torch.equal(generated(model, idx, 1, top_k=1), likeliest)
    top = model(idx)[0][:, -1].topk(3).indices
    draws = [generated(model, idx, 1, top_k=3, temperature=5.0)]
    draws = torch.cat(draws + [next(model.generate(idx, 1, 5.0, 3)) for _ in range(60)], 1)
    for row, allowed in zip(draws, top):
        assert set(row.tolist()) == set(allowed.tolist()), (
            "in 60 draws, all of the three likeliest and nothing else"
        )


def test_context_of_one_token():
    model = small("qv", "learned", block_size=1)
    assert generated(model, tokens(1, 3), 5).shape == (1, 5)


# Learning -------------------------------------------------------------------------------------------------------------


@CASES
def test_initial_loss_is_that_of_guessing(attention, pos):
    torch.manual_seed(4)
    model = GPT(config(attention, pos, block_size=64, vocab_size=65, n_layer=4, n_embd=128))
    idx = tokens(16, 65, vocab_size=65)
    assert abs(model(idx[:, :-1], idx[:, 1:])[1].item() - math.log(65)) < 0.1


@ONCE
def test_one_batch_overfits(attention, pos):
    model = small(attention, pos).float().train()
    idx = tokens(4, 25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1, "random text can only be learned by heart"


def test_sinusoids():
    """Sines and cosines of i / 10000^(2k/C), as large as embeddings start; the table of a longer context goes on."""
    table = small("qv", "sinusoidal", block_size=50).wpe.weight
    angle = torch.arange(50)[:, None] / 10000.0 ** (torch.arange(16) / 16)
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1).double()
    torch.testing.assert_close(table, waves * table[0, -1], rtol=1e-5, atol=1e-6)
    embeddings = small("qv", "learned", vocab_size=5000).wte.weight
    assert 0.95 < table.square().mean() / embeddings.square().mean() < 1.05
    assert torch.equal(small("qv", "sinusoidal").wpe.weight, table[:24])


def test_a_vector_that_nobody_gave_values_is_refused():
    class Forgetful(QV):
        def __init__(self, config):
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.empty(config.n_head))

    with mock.patch.dict(ATTENTIONS, forgetful=Forgetful):
        with pytest.raises(
            ValueError, match=r"blocks\.0\.attention\.gain has no values: only matrices are drawn"
        ):
            small("forgetful", "agf")


def test_keys_made_in_two_steps_start_as_large_as_in_one():
    torch.manual_seed(5)
    x = torch.randn(1, 64, 128)
    scale = {}
    for name in ATTENTIONS:
        config = GPTConfig(
            attention=name, pos="learned", block_size=64, n_layer=1, n_head=4, n_embd=128
        )
        module = GPT(config).blocks[0].attention
        scale[name] = module.read(module.query(x, 0), module.write(x, 0))[1].std().item()
    assert all(0.9 < value / scale["qkv"] < 1.1 for value in scale.values()), scale


# Configuration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong,words",
    [
        (
            dict(attention="qkw"),
            "attention='qkw' is unknown; choose one of qkv, gqa, mla, qv, qv_ka",
        ),
        (dict(pos="alibi"), "pos='alibi' is unknown; choose one of learned, sinusoidal, rope, agf"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(n_embd=50), "n_embd=50 must be a multiple of n_head=4, for example 52"),
        (dict(dropout=1.0), r"dropout=1.0 must lie in \[0, 1\), for example 0.1"),
        (dict(attention="gqa", n_kv_head=3), "n_kv_head=3 must divide n_head=4, for example 2"),
        (
            dict(pos="rope", n_embd=36),
            "n_embd=36 gives heads of odd width 9, but rope turns pairs; take 40",
        ),
        (dict(pos="rope", d_rope=5), "d_rope=5 must be even under rope, for example 4"),
        (
            dict(pos="rope", d_ctx=12),
            "d_ctx=12 must be a multiple of the head width 8 under rope, such as 16",
        ),
        (dict(d_latent=0), "d_latent=0 must be at least 1, for example 32"),
    ],
)
def test_a_wrong_configuration_gets_a_sentence(wrong, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SMALL, **wrong})


# Fork it --------------------------------------------------------------------------------------------------------------


def readmes_python():
    """The README's attention of one's own."""
    return re.search(
        r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S
    )[1]


def test_a_flag_of_ones_own(monkeypatch):
    code = readmes_python().replace(
        "torch.empty(self", "torch.empty(1 if config.shared_route else self"
    )
    field = '    shared_route: bool = option(False, "one route for all", only=dict(attention=("keyless",)))\n'
    source, end = Path(model_py.__file__).read_text() + "\n\n" + code, "\n    def __post_init__"
    assert source.count(end) == 1
    fork = types.ModuleType("fork")
    monkeypatch.setitem(sys.modules, "fork", fork)
    exec(source.replace(end, field + end), vars(fork))
    for shared, shape in (True, (1, 8, 8)), (False, (4, 8, 8)):
        config = fork.GPTConfig(attention="keyless", shared_route=shared, **SMALL)
        assert fork.GPT(config).blocks[0].attention.route.shape == shape


def test_the_readmes_own_attention():
    code = readmes_python()
    before = dict(ATTENTIONS)
    try:
        exec(code, vars(model_py))
        for pos in POSITIONS:
            keyless, qv = small("keyless", pos), small("qv", pos)
            same_functions(keyless, keyless)
            state = keyless.state_dict()
            for name in [
                name for name in state if name.endswith("route")
            ]:  # the routing belongs to W_Q
                wq = name.replace("route", "q.weight")
                state[wq] = (state.pop(name) @ state[wq].unflatten(0, (4, 8))).flatten(0, 1)
            qv.load_state_dict(state)
            same_functions(keyless, qv)
    finally:
        ATTENTIONS.clear()
        ATTENTIONS.update(before)
