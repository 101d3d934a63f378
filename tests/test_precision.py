"""Numbers of 16 bits, and torch.compile and torch.export over many lengths."""

import pytest
import torch
from helpers import (
    CASES,
    EVERY,
    FEW,
    attention_weights,
    cached_logits,
    config,
    logits,
    small,
    tokens,
    vectors,
)
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, Cache

# Under autocast -----------------------------------------------------------------------------------


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
def test_autocast_converts_each_matrix_once_in_a_generation(attention, pos):
    model = GPT(config(attention, pos)).eval()
    with torch.autocast("cpu", torch.bfloat16), Conversions() as conversions:
        counts = [conversions.count for _ in model.generate(tokens(1, 3), 6)]
    assert counts[1] == counts[-1] > 0


@CASES
def test_autocast_halves_the_cache(attention, pos):
    model = GPT(config(attention, pos)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        halved = model.cache_bytes()
    assert [2 * nbytes for nbytes in halved] == [*model.cache_bytes()]


@CASES
def test_bfloat16_is_near_float32(attention, pos):
    """Reading 200 tokens at once, or 199 and one more from the cache."""
    torch.manual_seed(6)
    module = GPT(config(attention, pos, block_size=200, n_embd=64)).blocks[0].attention.eval()
    x, cache = torch.randn(2, 200, 64), Cache(200)
    with torch.no_grad():
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            at_once = module(x)
            parts = [module(x[:, :199], 0, cache), module(x[:, 199:], 199, cache)]
    for y in at_once, torch.cat(parts, dim=1):
        assert (y - exact).norm() < 0.012 * exact.norm()
        assert (y - exact)[:, -1].norm() < 0.012 * exact[:, -1].norm()


@pytest.mark.parametrize("attention", ["qkv", "qv, one value", "qv_ka, one value", "mla"])
@pytest.mark.parametrize("start", [0, 39])
def test_bfloat16_does_not_round_the_decay(attention, start):
    """With queries of zero, weights are the power law alone. To round 16 log(40) = 59 to eight bits
    would change some of them by a tenth."""
    module = GPT(config(attention, "agf", block_size=40)).blocks[0].attention.eval()
    module.q.weight.data.zero_()
    module.decay.log_a.data.fill_(16.0).log_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weights = attention_weights(module, vectors(1, 40, 32).float(), start)[0, -1].double()
    power = torch.arange(40, 0, -1).double() ** -16.0
    expected = (power / power.sum()).expand(4, 40)
    torch.testing.assert_close(weights, expected, rtol=0.01, atol=1e-30)


def test_bfloat16_does_not_round_the_scores_of_contexts():
    """Which are added to those of values, here zero, for a token that is decoded. To round a score
    of 60 to eight bits would change a weight by a tenth."""
    module = small("qv_ka", "learned", block_size=40).float().blocks[0].attention
    module.w_k.data[:, module.d_ctx :] = 0.0
    module.q.weight.data *= 40.0
    x = vectors(1, 40, 32).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        weights = attention_weights(module, x, start=39)[0, 0].double()
        pairs, _ = module.read(module.query(x[:, 39:]), module.write(x, 0), 39)
    q_ctx, ctx = (tensor[0].double() for tensor in pairs[1])
    scores = module.scale * torch.einsum("the,she->hs", q_ctx, ctx.expand(-1, 4, -1))
    assert scores.abs().max() > 60
    torch.testing.assert_close(weights, scores.softmax(-1), rtol=0.01, atol=1e-30)


# All of a model in 16 bits ------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "half"])
def test_a_model_in_16_bits_reads_and_decodes(attention, pos, dtype):
    exact, idx = small(attention, pos).float(), tokens(2, 24)
    model = small(attention, pos).to(dtype)
    expected = logits(exact, idx)
    with torch.no_grad():
        for found in logits(model, idx), cached_logits(model, idx, [20, 1, 1, 2]):
            assert found.dtype == dtype
            assert (found - expected).norm() < 0.06 * expected.norm()
        assert len([*model.generate(idx[:, :5], 30)]) == 30


# Compiled -----------------------------------------------------------------------------------------


@FEW
def test_torch_compile_makes_no_graph_for_each_length(attention, pos):
    """The first length is a constant, the second a variable, and any other is as the second."""
    torch.compiler.reset()
    # It imports triton, which the kernel's tests have to do first.
    from torch._dynamo.testing import CompileCounter

    model, counter = small(attention, pos), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for T in 5, 6, 7, 9, 12, 24:
        idx = tokens(2, T)
        assert torch.equal(logits(compiled, idx), logits(model, idx))
    assert counter.frame_count == 2


@pytest.mark.parametrize("attention,pos", EVERY)
def test_torch_export_takes_any_length(attention, pos):
    module, T = small(attention, pos).blocks[0].attention, torch.export.Dim("T", min=2, max=24)
    shapes = {"x": {1: T}}
    exported = torch.export.export(module, (vectors(2, 7, 32),), dynamic_shapes=shapes).module()
    for length in 2, 5, 24:
        x = vectors(2, length, 32)
        torch.testing.assert_close(exported(x), module(x))
