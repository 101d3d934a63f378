"""The whole model: its block, its initial weights, dropout, its configuration, and loading it."""

import math
from collections import Counter
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, EVERY, FEW, SMALL, VARIANTS, config, logits, small, tokens, vectors
from torch.overrides import TorchFunctionMode

from model import ATTENTIONS, CHECKPOINT_FORMAT, GPT, POSITIONS, GPTConfig

# The model ----------------------------------------------------------------------------------------


def layer_norm(x, gain):
    centred = x - x.mean(-1, keepdim=True)
    return gain * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("pos", POSITIONS)
def test_the_model_is_gpt_2(pos):
    """Pre-norm blocks of attention and an MLP, without biases; embeddings are the output's, too."""
    model, idx = small("qv", pos), tokens(2, 24)
    gains = [gain for name, gain in model.named_parameters() if "ln_" in name]
    for gain, more in zip(gains, vectors(len(gains), 32)):
        gain.data += more  # so that it can be told from 1 and from the others
    x = model.wte.weight[idx]
    if pos in ("learned", "sinusoidal"):
        x = x + model.wpe.weight
    for block in model.blocks:
        x = x + block.attention(layer_norm(x, block.ln_1.weight))
        hidden = gelu(layer_norm(x, block.ln_2.weight) @ block.mlp.up.weight.T)
        x = x + hidden @ block.mlp.out.weight.T
    expected = layer_norm(x, model.ln_f.weight) @ model.wte.weight.T
    torch.testing.assert_close(logits(model, idx), expected)


def test_the_loss_is_the_mean_cross_entropy():
    model, idx, targets = small("qv", "agf"), tokens(2, 24), tokens(24, 2).T
    found, loss = model(idx, targets)
    p = found.softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, -p.log().mean())


def test_without_targets_only_the_last_logits_come():
    model, idx = small("qv", "agf"), tokens(2, 24)
    last, loss = model(idx)
    torch.testing.assert_close(last, logits(model, idx)[:, -1:])
    assert loss is None


def test_sinusoids():
    """Waves of frequencies 10000^(-2k/C), as large as embeddings; a longer table goes on."""
    table = small("qv", "sinusoidal", block_size=50).wpe.weight
    angle = torch.arange(50)[:, None] / 10000.0 ** (torch.arange(16) / 16)
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1).double()
    torch.testing.assert_close(table, waves * table[0, -1], rtol=1e-5, atol=1e-6)
    embeddings = small("qv", "learned", vocab_size=5000).wte.weight
    assert 0.95 < table.square().mean() / embeddings.square().mean() < 1.05
    assert torch.equal(small("qv", "sinusoidal").wpe.weight, table[:24])


# Initial weights ----------------------------------------------------------------------------------


def test_a_matrix_starts_with_the_scale_of_its_inputs():
    model = small("qv_ka", "learned", n_embd=128, vocab_size=500, block_size=200)
    block = model.blocks[0]
    fan_in = {
        block.attention.q.weight: 128,
        block.attention.v.weight: 128,
        block.attention.ctx.weight: 128,
        block.attention.w_k: 96,
        block.mlp.up.weight: 128,
    }
    for weights, n in fan_in.items():
        assert 0.95 < weights.std() * math.sqrt(n) < 1.05
    into_residual = {block.attention.out.weight: 128, block.mlp.out.weight: 512}
    for weights, n in into_residual.items():
        assert 0.95 < weights.std() * math.sqrt(n) * math.sqrt(2 * 2) < 1.05  # of two layers
    for embedding in model.wte.weight, model.wpe.weight:
        assert 0.95 < embedding.std() * math.sqrt(128) / 0.3 < 1.05


def test_a_forks_matrix_is_no_embedding_whatever_its_name():
    class Warped(ATTENTIONS["qv"]):
        def __init__(self, config):
            super().__init__(config)
            self.warp = torch.nn.Parameter(torch.empty(100, 100))

    with mock.patch.dict(ATTENTIONS, warped=Warped):
        warp = small("warped", "agf").blocks[0].attention.warp
    assert 0.095 < warp.std() < 0.105


@pytest.mark.parametrize("attention", [*ATTENTIONS, "qv_ka, diagonal", "qv_ka, shared"])
@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_keys_made_in_two_steps_start_as_large_as_in_one(attention, pos):
    module = small(attention, pos, n_embd=128).blocks[0].attention
    x = vectors(1, 20, 128)
    pairs, _ = module.read(module.query(x), module.write(x, 0), 0)
    if len(pairs) == 1:
        assert 0.9 < pairs[0][1].std() < 1.1, "x W_K has a standard deviation of 1"
    scores = 0.0
    for q, k in pairs:
        k = k.repeat_interleave(4 // k.size(2), dim=2)
        scores = scores + torch.einsum("bthd,bshd->bhts", q, k)
    assert 0.8 < (scores * module.scale).std() < 1.2


@CASES
def test_initial_loss_is_that_of_guessing(attention, pos):
    sizes = {"block_size": 64, "vocab_size": 65, "n_layer": 4, "n_embd": 128}
    torch.manual_seed(4)
    model, idx = GPT(config(attention, pos, **sizes)), tokens(4, 65, vocab_size=65)
    assert abs(model(idx[:, :-1], idx[:, 1:])[1].item() - math.log(65)) < 0.1


@FEW
def test_one_batch_is_learned_by_heart(attention, pos):
    model, idx = small(attention, pos).float().train(), tokens(4, 25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# Dropout ------------------------------------------------------------------------------------------


class Dropouts(TorchFunctionMode):
    """Counts where activations are dropped, by the probability."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs["dropout_p"]:
            self.count["attention weights", kwargs["dropout_p"]] += 1
        if function is torch.dropout or function is F.dropout:
            p, training = [*args[1:], *kwargs.values()][:2]
            if training and p:
                self.count["activations", p] += 1
        return function(*args, **kwargs)


@CASES
def test_dropout_is_everywhere_where_gpt_2_has_it(attention, pos):
    """After the embeddings; in each layer on attention weights, after attention and the MLP."""
    model, idx = small(attention, pos, dropout=0.25).train(), tokens(2, 24)
    with Dropouts() as dropouts:
        model(idx)
    layers = 2
    assert dropouts.count == {
        ("activations", 0.25): 1 + 2 * layers,
        ("attention weights", 0.25): layers,
    }


def test_what_is_dropped_is_half_of_the_embeddings_and_of_what_a_layer_adds():
    model = small("qv", "learned", dropout=0.5).train()
    block, x = model.blocks[0], vectors(4, 24, 32)
    for made in model.embed(tokens(4, 24)), block.attention(x), block.mlp(x):
        assert 0.45 < (made == 0).double().mean() < 0.55


@CASES
def test_nothing_is_dropped_in_evaluation_and_sampling(attention, pos):
    model, idx = small(attention, pos, dropout=0.5), tokens(2, 24)
    same = small(attention, pos)
    same.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, idx), logits(same, idx))
    streams = [torch.cat([*m.generate(idx[:, :3], 4, temperature=0)], dim=1) for m in (model, same)]
    assert torch.equal(*streams)
    assert not torch.equal(logits(model.train(), idx), logits(same, idx))


# Configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", VARIANTS)
def test_a_changed_configuration_is_as_one_built_anew(attention):
    """Sizes that follow from others are not kept when those change."""
    start = GPT(GPTConfig(**SMALL)).config
    variant = {"pos": "rope", **VARIANTS[attention], "n_embd": 64}
    assert replace(start, **variant) == GPTConfig(**{**SMALL, **variant})
    assert replace(start, **variant).resolve() == GPTConfig(**{**SMALL, **variant}).resolve()


def test_sizes_that_follow_from_others():
    sizes = GPTConfig(n_embd=96, n_head=6, attention="gqa").resolve()
    found = sizes.n_kv_head, sizes.d_latent, sizes.d_rope, sizes.d_ctx, sizes.n_inner
    assert found == (3, 64, 8, 32, 384)
    assert GPTConfig(n_head=3, attention="gqa").resolve().n_kv_head == 1
    assert GPTConfig(attention="qv").resolve().n_kv_head == 6
    assert GPTConfig(attention="qv", n_kv_head=2).resolve().n_kv_head == 2


@pytest.mark.parametrize(
    "wrong,sentence",
    [
        ({"attention": "qkw"}, "attention='qkw' is unknown; choose one of qkv, gqa, mla, qv,"),
        ({"pos": "alibi"}, "pos='alibi' is unknown; choose one of learned, sinusoidal,"),
        ({"wk": "full"}, "wk='full' is unknown; choose one of per_head, shared, diagonal"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"d_latent": 0}, "d_latent=0 must be at least 1"),
        ({"n_embd": 50}, "n_embd=50 must be a multiple of n_head=4, for example 52"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\), for example 0.1"),
        ({"attention": "gqa", "n_kv_head": 3}, "n_kv_head=3 must divide n_head=4"),
        ({"pos": "rope", "n_embd": 36}, "n_embd=36 gives heads of odd width 9 under rope; take 40"),
        ({"pos": "rope+agf", "d_rope": 5}, "d_rope=5 must be even, for rope rotates pairs"),
        ({"pos": "rope", "d_ctx": 12}, "d_ctx=12 must be a multiple of the head width 8"),
        ({"pos": "agf", "wk": "diagonal", "d_ctx": 12}, "head width 8 with wk=diagonal"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_gets_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPTConfig(**{**SMALL, **wrong})


@CASES
def test_a_model_can_be_built_without_memory(attention, pos):
    with torch.device("meta"):
        model = GPT(config(attention, pos))
    model.to_empty(device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pos", POSITIONS)
def test_a_checkpoint_holds_what_is_learned_and_no_table(pos):
    """So it can be loaded for a longer context, too."""
    model = small("qv", pos)
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}


def save(network, path, **changes):
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model_config": asdict(network.config),
        "model": network.state_dict(),
        "seconds": 12.5,
    }
    torch.save({**checkpoint, **changes}, path)


@pytest.mark.parametrize("attention,pos", EVERY)
def test_a_checkpoint_gives_its_model_ready_to_sample(tmp_path, attention, pos):
    model = GPT(config(attention, pos, dropout=0.5))
    save(model, tmp_path / "last.pt")
    loaded, checkpoint = GPT.load(tmp_path / "last.pt")
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(logits(loaded, tokens(2, 24)), logits(model.eval(), tokens(2, 24)))
    assert checkpoint["seconds"] == 12.5


def sentence_of_loading(path):
    with pytest.raises(ValueError) as caught:
        GPT.load(path)
    return str(caught.value)


def test_a_missing_checkpoint_gets_a_sentence(tmp_path):
    assert "there is no checkpoint" in sentence_of_loading(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04"], ids=str)
def test_a_file_that_is_no_checkpoint_gets_a_sentence(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    assert "no checkpoint of this code" in sentence_of_loading(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "saved", [[1, 2], {"model": {}}, {"format": CHECKPOINT_FORMAT - 1}], ids=str
)
def test_something_else_that_torch_saved_gets_a_sentence(tmp_path, saved):
    torch.save(saved, tmp_path / "last.pt")
    assert "no checkpoint of this code" in sentence_of_loading(tmp_path / "last.pt")


def test_a_checkpoint_cut_short_gets_a_sentence(tmp_path):
    save(GPT(config("qv", "agf")), tmp_path / "last.pt")
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert "no checkpoint of this code" in sentence_of_loading(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"model_config": {"attention": "keyless"}},
        {"model_config": {"window": 8}},
        {"model_config": {"attention": "qv", "n_embd": 48}},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_gets_a_sentence(tmp_path, changes):
    save(GPT(config("qv", "agf")), tmp_path / "last.pt", **changes)
    assert "was written by another version of model.py" in sentence_of_loading(tmp_path / "last.pt")
