"""What is remembered, that it gives what a full pass gives, and the text that comes of it."""

import math
import re
from pathlib import Path

import pytest
import torch
from helpers import CASES, FEW, FORMULAS, VARIANTS, cached_logits, logits, small, tokens

import model as model_py
from model import ATTENTIONS

# The cache ----------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("chunks", [[1] * 24, [7, 1, 1, 9, 2, 4], [23, 1]], ids=str)
def test_cached_is_full(attention, pos, chunks):
    """However the tokens come: one by one, in ragged chunks, or a prompt and one more."""
    model, idx = small(attention, pos), tokens(3, 24)
    found = cached_logits(model, idx, chunks)
    torch.testing.assert_close(found, logits(model, idx), rtol=1e-10, atol=1e-12)


def table(text):
    """The last column of the table of attentions: {name: numbers per token and layer}."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip(" `") for cell in re.split(r"\||  +", line) if cell.strip()]
        if len(cells) == 5 and cells[0] in ATTENTIONS:
            found[cells[0]] = cells[-1]
    return found


def numbers(formula, config):
    """The value of such a formula: terms with + between, factors with blanks."""
    values = {"H": config.n_head, "G": config.n_kv_head, "D": config.n_embd // config.n_head}
    values |= {"d_ctx": config.d_ctx, "d_latent": config.d_latent, "2": 2}
    values["d_rope"] = config.d_rope if "rope" in config.pos else 0
    terms = re.sub(r"[()]|under rope", "", formula).split("+")
    return sum(math.prod(values[factor] for factor in term.split()) for term in terms)


@FORMULAS
def test_cache_takes_what_the_tables_say(attention, pos):
    model = small(attention, pos).float()
    cache = model.new_cache()
    model(tokens(2, 7), cache=cache)
    model(tokens(2, 1), cache=cache)
    assert [layer.length for layer in cache] == [8, 8]
    nbytes = sum(buffer.nbytes for layer in cache for buffer in layer.buffers)
    sequences, layers, context, bytes_each = 2, 2, 24, 4
    per_token = nbytes / (sequences * layers * context * bytes_each)
    one_token = layers * bytes_each * per_token
    assert model.cache_bytes() == (context * one_token, one_token)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    name = VARIANTS[attention]["attention"]
    for text in model_py.__doc__, readme:
        assert per_token == numbers(table(text)[name], model.config.resolve())


def test_cache_ends_with_the_context():
    model = small("qv_ka", "agf")
    cache = model.new_cache()
    model(tokens(1, 24), cache=cache)
    with pytest.raises(ValueError, match=r"24 \+ 1 tokens are more than the context of 24"):
        model(tokens(1, 1), cache=cache)


# Generation ---------------------------------------------------------------------------------------


def generated(model, idx, count, seed=3, **options):
    torch.manual_seed(seed)
    return torch.cat(list(model.generate(idx, count, **options)), dim=1)


@CASES
def test_generation_needs_no_cache(attention, pos):
    model = small(attention, pos)
    for prompt in tokens(2, 1), tokens(2, 40):
        with_cache = generated(model, prompt, 26)
        assert with_cache.shape == (2, 26)
        assert torch.equal(with_cache, generated(model, prompt, 26, use_cache=False))


@FEW
def test_when_the_context_is_full_its_last_half_is_read_again(attention, pos):
    model, window, expected = small(attention, pos), tokens(2, 20), []
    torch.manual_seed(3)
    for _ in range(30):
        if window.size(1) > 24:
            window = window[:, -12:]
        token = torch.multinomial(model(window)[0][:, -1].float().softmax(-1), 1)
        window = torch.cat([window, token], dim=1)
        expected.append(token)
    assert torch.equal(generated(model, tokens(2, 20), 30), torch.cat(expected, dim=1))


def test_generation_keeps_nothing_for_gradients():
    model, kept = small("qv", "learned"), []
    model.ln_f.register_forward_hook(lambda module, x, y: kept.append(y.requires_grad))
    generated(model, tokens(1, 3), 4)
    assert kept == [False] * 4


def test_a_context_of_one_token_generates():
    model = small("qv", "learned", block_size=1)
    assert generated(model, tokens(1, 3), 5).shape == (1, 5)


# How a token is drawn -----------------------------------------------------------------------------

LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0]).log()  # the probabilities are 0, 1/6, 2/6, 3/6


def frequencies(temperature, top_k=None):
    torch.manual_seed(0)
    draws = model_py.sample(LOGITS.expand(60_000, -1), temperature, top_k)
    assert draws.shape == (60_000, 1)
    return draws.flatten().bincount(minlength=4) / len(draws)


@pytest.mark.parametrize(
    "temperature,top_k,expected",
    [
        (1.0, None, [0, 1 / 6, 2 / 6, 3 / 6]),
        (0.5, None, [0, 1 / 14, 4 / 14, 9 / 14]),  # squares
        (1.0, 2, [0, 0, 2 / 5, 3 / 5]),
        (1.0, 100, [0, 1 / 6, 2 / 6, 3 / 6]),  # more than there are: all
        (1.0, 1, [0, 0, 0, 1]),
        (0, None, [0, 0, 0, 1]),
        (1e-30, None, [0, 0, 0, 1]),
    ],
)
def test_a_tokens_distribution(temperature, top_k, expected):
    found = frequencies(temperature, top_k)
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=0, atol=0.01)


def test_generate_draws_by_temperature_and_top_k():
    model, idx = small("qv_ka", "rope"), tokens(4, 5)
    ranks = model(idx)[0][:, -1].argsort(-1, descending=True)
    assert torch.equal(generated(model, idx, 1, temperature=0), ranks[:, :1])
    draws = [generated(model, idx, 1, seed, top_k=3, temperature=5.0) for seed in range(60)]
    for row, likeliest in zip(torch.cat(draws, dim=1).tolist(), ranks[:, :3].tolist()):
        assert set(row) == set(likeliest)
