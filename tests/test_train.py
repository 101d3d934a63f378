"""train.py: its command line, its steps, its optimizers, what it measures and what it writes. How
runs stop and go on is in test_stop_and_resume.py, the machine in test_machine.py, misuse in
test_misuse.py."""

import copy
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TEXT,
    TINY,
    call,
    checkpoint,
    log,
    losses,
    on_batch,
    program,
    same,
)

import model
import prepare
import train
from model import ATTENTIONS, GPT, POSITIONS, GPTConfig
from train import TrainConfig, autocast

CPU = torch.device("cpu")
FLOAT32 = autocast(CPU, "float32")

# The command line ---------------------------------------------------------------------------------


def test_prepare_and_train_from_the_command_line(tmp_path):
    """As in the README, in processes of their own: text in, tokens, training. PyTorch's compiler is
    not imported on the way: it would take a second or two of a run that lasts half a minute."""
    (tmp_path / "bottles.txt").write_text(TEXT)
    result = program(ROOT / "prepare.py", "bottles.txt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    flags = ["--dataset=bottles", *TINY[1:], "--max_steps=8", "--out=out/run"]
    result = program("-X", "importtime", ROOT / "train.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "torch.optim" in result.stderr and "torch._dynamo" not in result.stderr
    assert "python sample.py --out=out/run" in result.stdout
    assert len(losses(tmp_path / "out/run")) == 8
    names = {path.name for path in (tmp_path / "out/run").iterdir()}
    assert names == {"config.json", "log.jsonl", "loss.png", "best.pt", "last.pt"}


def test_importing_does_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import prepare\n"
        "assert 'torch' not in sys.modules\n"
        "import sample, train\n"
    )
    result = program("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prepare", "train", "sample"])
def test_help_teaches(name, capsys):
    assert call(name, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"python {name}.py" in text and "default" in text


def test_help_lists_presets_and_every_flag(capsys):
    assert call("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "presets: cpu n_layer=4" in text
    for config in TrainConfig, GPTConfig:
        for field in dataclasses.fields(config):
            assert f"--{field.name}" in text or field.name == "vocab_size"
            assert not field.metadata["help"].startswith("of ")


@pytest.mark.parametrize("attention,pos", list(zip(ATTENTIONS, itertools.cycle(POSITIONS))))
def test_every_attention_trains_and_samples(folder, capsys, attention, pos):
    assert call("train", *TINY, f"--attention={attention}", f"--pos={pos}", "--out=out/new") is None
    flags = ["--prompt=wall", "--max_new_tokens=30", "--num_samples=2", "--top_k=5"]
    assert call("sample", "--out=out/new", *flags) is None
    assert capsys.readouterr().out.count("wall") >= 2


def test_gpt2_trains_and_streams_whole_characters(folder, gpt2, capsys):
    Path("dogs.txt").write_text("一只小狗。" * 300, encoding="utf-8")
    assert call("prepare", "dogs.txt", "--tokenizer=gpt2") is None
    steps = ["--max_steps=40", "--eval_interval=40", "--learning_rate=2e-2", "--warmup_steps=0"]
    flags = ["--dataset=dogs", *TINY[1:], *steps, "--eval_tokens=50", "--out=out/dogs"]
    assert call("train", *flags) is None
    assert checkpoint("out/dogs")["model_config"]["vocab_size"] == 50304
    capsys.readouterr()
    flags = ["--prompt=一只", "--max_new_tokens=30", "--temperature=0"]
    assert call("sample", "--out=out/dogs", *flags) is None
    assert "小狗。一只" in capsys.readouterr().out


def test_without_network_the_default_is_pydoc_and_a_named_data_set_is_not(
    folder, monkeypatch, capsys
):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    assert call("train", *TINY[1:], "--out=out/default") is None
    assert "pydoc" in capsys.readouterr().out
    assert checkpoint("out/default")["train_config"]["dataset"] == "pydoc"
    sentence = call("train", *TINY[1:], "--dataset=shakespeare_char", "--out=out/named")
    assert "cannot be downloaded" in sentence and not Path("out/named").exists()


@pytest.mark.parametrize(
    "flags,compiles",
    [
        (["--compile"], True),
        (["--compile=True"], True),
        (["--compile=false"], False),
        (["--no-compile"], False),
        ([], None),
    ],
    ids=str,
)
def test_a_flag_that_is_true_or_false(flags, compiles):
    assert train.parse(flags).get("compile") is compiles


def test_presets_are_defaults_that_flags_override():
    training, shape = train.configure({"preset": "cpu", "n_layer": 2})
    assert (shape.n_layer, shape.n_embd, training.max_steps) == (2, 128, 600)


# The cpu preset is that of the stored runs; the others are nanoGPT's.
PRESETS = {
    "cpu": {
        "dataset": None,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "block_size": 64,
        "dropout": 0.0,
        "batch_size": 12,
        "micro_batch_size": None,
        "max_steps": 600,
        "optimizer": "muon",
        "learning_rate": 1e-2,
        "warmup_steps": 20,
        "weight_decay": 0.2,
        "beta2": 0.95,
        "eval_interval": 120,
        "eval_tokens": 4096,
    },
    "gpu": {
        "dataset": None,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "block_size": 256,
        "dropout": 0.2,
        "batch_size": 64,
        "micro_batch_size": None,
        "max_steps": 5000,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "beta2": 0.99,
        "eval_interval": 250,
        "eval_tokens": None,
    },
    "gpt2": {
        "dataset": "openwebtext",
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "dropout": 0.0,
        "batch_size": 480,
        "micro_batch_size": 12,
        "max_steps": 600_000,
        "optimizer": "adamw",
        "learning_rate": 6e-4,
        "warmup_steps": 2000,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "eval_interval": 1000,
        "eval_tokens": 2_000_000,
    },
}
EVERY_PRESET = {
    "attention": "qv",
    "pos": "rope+agf",
    "seed": 1337,
    "grad_clip": 1.0,
    "n_inner": None,
}


@pytest.mark.parametrize("preset", train.PRESETS)
def test_what_a_preset_means(preset):
    training, shape = train.configure({"preset": preset})
    found = dataclasses.asdict(training) | dataclasses.asdict(shape)
    expected = EVERY_PRESET | PRESETS[preset] | {"preset": preset}
    assert {name: found[name] for name in expected} == expected


def test_the_gpu_preset_has_the_size_of_nanogpts():
    _, shape = train.configure({"preset": "gpu", "attention": "qkv"})
    assert 10.0e6 < sum(weights.numel() for weights in GPT(shape).parameters()) < 11e6


def test_an_attention_of_ones_own_has_a_flag_of_its_own(folder, monkeypatch):
    """A fork adds a field to GPTConfig, in two lines, and --help, the check and checkpoints know of
    it."""

    class Mine(ATTENTIONS["qv"]):
        pass

    @dataclasses.dataclass(frozen=True)
    class Config(GPTConfig):
        width: int | None = model.option(3, "width of mine", only={"attention": ("mine",)})

    monkeypatch.setitem(ATTENTIONS, "mine", Mine)
    monkeypatch.setattr(train, "GPTConfig", Config)
    monkeypatch.setattr(model, "GPTConfig", Config)
    assert call("train", *TINY, "--attention=mine", "--width=5", "--out=out/mine") is None
    assert call("train", "--resume", "--out=out/mine", "--max_steps=7", "--width=5") is None
    assert checkpoint("out/mine")["model_config"]["width"] == 5
    words = "--width counts only with --attention=mine, as its `only` in model.py says, and this is"
    assert words in call("train", *TINY, "--attention=qkv", "--width=5")


def test_a_flag_for_other_attentions_says_how_an_own_one_takes_it(folder, monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "mine", ATTENTIONS["qv"])
    sentence = call("train", *TINY, "--attention=mine", "--n_kv_head=1")
    assert "--n_kv_head counts only with --attention=gqa or qv or qv_ka, as its" in sentence
    assert "`only` in model.py says, and this is mine; leave it out" in sentence


# A step -------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_seed_and_step():
    data = np.arange(1000, dtype=np.uint16)
    one, two = TrainConfig(batch_size=8), TrainConfig(batch_size=8, seed=2)
    x, y = train.batch(data, one, 5, 7, CPU)
    assert torch.equal(x + 1, y) and x.shape == (8, 5)
    assert torch.equal(x, train.batch(data, one, 5, 7, CPU)[0])
    assert not torch.equal(x, train.batch(data, one, 5, 8, CPU)[0])
    assert not torch.equal(x, train.batch(data, two, 5, 7, CPU)[0])


def test_processes_share_a_batch():
    data, config = np.arange(1000, dtype=np.uint16), TrainConfig(batch_size=8)
    x, _ = train.batch(data, config, 5, 7, CPU)
    shares = [train.batch(data, config, 5, 7, CPU, rank, 2)[0] for rank in range(2)]
    assert torch.equal(torch.cat(shares), x) and not torch.equal(*shares)


def test_batches_start_at_every_token_that_has_a_window():
    data, config = np.arange(8, dtype=np.uint16), TrainConfig(batch_size=8)
    batches = [train.batch(data, config, 5, step, CPU) for step in range(20)]
    assert {int(start) for x, _ in batches for start in x[:, 0]} == {0, 1, 2}


def orthogonal(x):
    """What Polar Express is meant to do to one matrix, done to its singular values."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt() / 1.01
    for a, b, c in (
        (8.28721, -23.59589, 17.30039),
        (4.10706, -2.94785, 0.54484),
        (3.94869, -2.90890, 0.55182),
    ):
        s = a * s + b * s**3 + c * s**5
    return (u * s @ v).float()


def muon_by_hand(w, mean, rate, decay):
    """One step of Muon on one matrix, or on each head's, with the momentum `mean`."""
    mean.mul_(0.9).add_(0.1 * w.grad)
    ahead = 0.9 * mean + 0.1 * w.grad
    matrices = [orthogonal(matrix) for matrix in ahead.reshape(-1, *w.shape[-2:])]
    change = 0.2 * max(w.shape[-2:]) ** 0.5 * torch.stack(matrices).reshape(w.shape)
    w.data = w.data * (1 - rate * decay) - rate * change


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_are_plain_gradient_descent_on_the_mean_loss(folder, optimizer):
    """Two steps in micro-batches, from a seed, against two steps on the whole batch by hand: the
    weights, and the losses that are reported. Muon moves each matrix in the blocks by itself, and
    of W_K each head's; AdamW moves the rest."""
    flags = [f"--optimizer={optimizer}", "--micro_batch_size=2", "--warmup_steps=0", "--seed=5"]
    flags += ["--attention=qv_ka"]
    flags += ["--grad_clip=0.5", "--weight_decay=0.7", "--max_steps=2", "--out=out/new"]
    assert call("train", *TINY, *flags) is None
    state = checkpoint("out/new")
    config = TrainConfig(**state["train_config"])
    torch.manual_seed(5)
    twin = GPT(GPTConfig(**state["model_config"]))
    matrices = {name: w for name, w in twin.named_parameters() if w.dim() > 1}
    moved = {n: w for n, w in matrices.items() if optimizer == "muon" and n.startswith("blocks")}
    means = {name: torch.zeros_like(w) for name, w in moved.items()}
    others = [w for name, w in twin.named_parameters() if name not in moved]
    adamw = torch.optim.AdamW(
        [
            {"params": [w for w in others if w.dim() > 1], "weight_decay": 0.7},
            {"params": [w for w in others if w.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, config.beta2),
    )
    data = prepare.read_dataset("tiny")[1]["train"]
    for step, reported in enumerate(state["losses"]):
        _, loss = twin(*train.batch(data, config, 16, step, CPU))
        assert reported == pytest.approx(loss.item(), rel=1e-6)
        twin.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        rate = train.learning_rate(step, config)
        for name, w in moved.items():
            muon_by_hand(w, means[name], rate, 0.7)
            w.grad = None
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    assert {w.dim() for w in moved.values()} == ({2, 3} if optimizer == "muon" else set())
    for name, theirs in twin.named_parameters():
        ours = state["model"][name]
        torch.testing.assert_close(ours, theirs.data, rtol=1e-4, atol=2e-5, msg=name)


def test_the_seed_changes_weights_and_batches(folder):
    for seed in 1, 2:
        flags = ["--max_steps=1", "--learning_rate=0", f"--seed={seed}", f"--out=out/{seed}"]
        assert call("train", *TINY, *flags) is None
    one, two = checkpoint("out/1"), checkpoint("out/2")
    assert not torch.equal(one["model"]["wte.weight"], two["model"]["wte.weight"])
    assert one["losses"] != two["losses"]


def test_dropout_draws_anew_in_each_step_and_not_in_evaluations(folder, monkeypatch):
    """With rates of 0 and one batch for ever, only dropout tells one step from another."""
    batch = train.batch
    monkeypatch.setattr(train, "batch", lambda *args: batch(*args[:3], 0, *args[4:]))
    flags = ["--learning_rate=0", "--dropout=0.5", "--max_steps=4", "--eval_interval=1"]
    assert call("train", *TINY, *flags, "--out=out/new") is None
    assert len(set(losses("out/new"))) == 4
    assert len({entry["val_loss_part"] for entry in log("out/new")}) == 1


def test_dropout_follows_from_the_seed():
    network = GPT(GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    idx = torch.arange(32).view(4, 8)
    one, again, other = (
        train.train_step(network, [], TrainConfig(batch_size=4, seed=seed), 7, idx, idx, FLOAT32)
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_the_learning_rate():
    config = TrainConfig(learning_rate=1.0, warmup_steps=9, max_steps=100)
    rates = [train.learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and np.argmax(rates) == 9 and rates[9] > 0.97
    assert rates[50] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=0.001)


# Optimizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_decay_and_vectors_do_not(name):
    network = GPT(GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=4, pos="agf"))
    optimizers = train.make_optimizers(network, TrainConfig(optimizer=name, weight_decay=0.3))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decay = {id(w): group["weight_decay"] for group in groups for w in group["params"]}
    assert decay == {id(w): 0.3 if w.dim() > 1 else 0.0 for w in network.parameters()}


def test_muon_moves_the_matrices_in_the_blocks():
    network = GPT(GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=4, pos="learned"))
    muon, adamw = train.make_optimizers(network, TrainConfig(optimizer="muon"))
    moved = {id(w) for group in muon.param_groups for w in group["params"]}
    names = {name for name, w in network.named_parameters() if id(w) in moved}
    assert {"blocks.0.mlp.up.weight", "blocks.0.attention.q.weight"} < names
    assert not names & {"wte.weight", "wpe.weight", "ln_f.weight", "blocks.0.ln_1.weight"}


@pytest.mark.parametrize(
    "shape", [(4, 16, 16), (3, 48, 16), (3, 16, 48), (1, 5, 64), (2, 128, 512)], ids=str
)
def test_muon_makes_steps_orthogonal(shape):
    """Singular values between a and a tenth of a come near to 1, whatever a is, and singular
    vectors stay."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(-1, 3, shape[0])[:, None, None]
    x = u * torch.linspace(0.1, 1, u.size(2)) @ v * sizes
    made = train.orthogonal(x)
    values = torch.linalg.svdvals(made)
    assert made.shape == x.shape and 0.15 < values.min() and values.max() < 1.9
    cosines = torch.cosine_similarity(made.flatten(1), (u @ v).flatten(1))
    assert cosines.min() > 0.85
    for one, matrix in zip(made, x):
        torch.testing.assert_close(one, orthogonal(matrix), rtol=1e-3, atol=1e-5)


def test_muon_leaves_alone_what_has_a_gradient_of_zero():
    w = torch.nn.Parameter(torch.ones(3, 4))
    w.grad = torch.zeros(3, 4)
    train.Muon([w], weight_decay=0.0).step()
    assert torch.equal(w, torch.ones(3, 4))


def small_problem(kind):
    """A matrix, an optimizer of it, and a function that computes a loss and its gradient."""
    torch.manual_seed(0)
    w, target = torch.nn.Parameter(torch.randn(4, 6)), torch.randn(4, 6)
    optimizer = kind([w], lr=0.1)

    def compute_gradient():
        optimizer.zero_grad()
        loss = (w - target).square().sum()
        loss.backward()
        return loss

    return w, optimizer, compute_gradient


@pytest.mark.parametrize("kind", [train.Muon, train.AdamW])
def test_optimizers_reduce_a_loss(kind):
    _, optimizer, compute_gradient = small_problem(kind)
    losses = []
    for _ in range(5):
        losses.append(compute_gradient().item())
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [train.Muon, train.AdamW])
def test_a_copied_optimizer_goes_on_as_the_first_does(kind):
    w, optimizer, compute_gradient = small_problem(kind)
    compute_gradient()
    optimizer.step()
    w2, twin = copy.deepcopy((w, optimizer))
    for _ in range(3):
        compute_gradient()
        w2.grad = w.grad.clone()
        optimizer.step()
        twin.step()
    assert torch.equal(w, w2)


@pytest.mark.parametrize("kind", [train.Muon, train.AdamW])
def test_a_loaded_optimizer_goes_on_as_the_saved_one_does(kind):
    w, optimizer, compute_gradient = small_problem(kind)
    compute_gradient()
    optimizer.step()
    other, twin, _ = small_problem(kind)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.data = w.data.clone()
    compute_gradient()
    other.grad = w.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(w, other)


def test_adamw_is_that_of_pytorch():
    steps = []
    for kind in train.AdamW, torch.optim.AdamW:
        w, optimizer, compute_gradient = small_problem(kind)
        for _ in range(3):
            compute_gradient()
            optimizer.step()
        steps.append(w)
    assert torch.equal(*steps)


# Frozen and unused parameters ---------------------------------------------------------------------


class Partly(ATTENTIONS["qv"]):
    """An attention with parameters that are frozen, or that nothing uses."""

    def __init__(self, config):
        super().__init__(config)
        self.q.weight.requires_grad_(False)
        self.unused_matrix = torch.nn.Parameter(torch.ones(3, 4))
        self.unused_vector = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_and_unused_parameters_train_save_load_and_resume(folder, monkeypatch, optimizer):
    monkeypatch.setitem(ATTENTIONS, "partly", Partly)
    flags = [*TINY, "--attention=partly", f"--optimizer={optimizer}", "--grad_clip=0.1"]
    assert call("train", *flags, "--out=out/whole") is None
    with monkeypatch.context() as patch:
        on_batch(patch, {4: interrupt})
        assert call("train", *flags, "--out=out/parts") == "interrupted"
    assert call("train", "--resume", "--out=out/parts") is None
    whole, parts = checkpoint("out/whole"), checkpoint("out/parts")
    for key in "model", "optimizers", "losses":
        assert same(whole[key], parts[key]), key
    assert call("sample", "--out=out/parts", "--max_new_tokens=3") is None
    torch.manual_seed(1337)
    untrained = GPT(GPTConfig(**whole["model_config"]))
    idle = "q.weight", "unused_matrix", "unused_vector"
    for name in (f"blocks.0.attention.{end}" for end in idle):
        assert torch.equal(whole["model"][name], untrained.get_parameter(name)), name


def interrupt():
    raise KeyboardInterrupt


# Validation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count,eval_tokens,predicted", [(83, None, 82), (81, None, 80), (10, None, 9), (83, 20, 20)]
)
def test_validation_covers_every_token_once(folder, count, eval_tokens, predicted):
    """Against the definition: each token after the first, from those before it in its window of
    16."""
    network, _ = GPT.load("out/run/last.pt")
    val = prepare.read_dataset("tiny")[1]["val"][:count]
    expected = []
    for i in range(1, predicted + 1):
        before = torch.from_numpy(val[(i - 1) // 16 * 16 : i].astype(np.int64))
        logits = network(before[None])[0][0, -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(int(val[i])))
        expected.append(loss.item())
    arguments = network, val, 2, autocast(CPU, "float32"), eval_tokens
    loss_sum, number = train.evaluate(*arguments)
    assert number == predicted and math.isclose(loss_sum, sum(expected), rel_tol=1e-5)
    shares = [train.evaluate(*arguments, rank, 2) for rank in range(2)]
    assert np.sum(shares, 0) == pytest.approx([loss_sum, number])


def test_validation_takes_no_more_tokens_at_once_than_a_micro_batch(folder, monkeypatch):
    shapes, forward = set(), GPT.forward

    def watched(self, idx, *rest):
        shapes.add(idx.numel())
        return forward(self, idx, *rest)

    monkeypatch.setattr(GPT, "forward", watched)
    assert call("train", *TINY, "--out=out/new", "--micro_batch_size=2") is None
    assert max(shapes) == 2 * 16


def test_evaluations_are_of_a_part_and_the_last_is_of_all(folder):
    """Each is compared with what the checkpoint of its step gives."""
    assert call("train", *TINY, "--out=out/new") is None
    entries, val = log("out/new"), prepare.read_dataset("tiny")[1]["val"]
    assert [sorted(entry) for entry in entries] == [
        ["step", "train_loss", "val_loss_part"],
        ["step", "train_loss", "val_loss", "val_loss_part"],
    ]
    network, _ = GPT.load("out/new/last.pt")
    part, count = train.evaluate(network, val, 4, autocast(CPU, "float32"), 500)
    whole, total = train.evaluate(network, val, 4, autocast(CPU, "float32"))
    assert count == 500 and total == len(val) - 1
    assert entries[-1]["val_loss_part"] == pytest.approx(part / count)
    assert entries[-1]["val_loss"] == pytest.approx(whole / total)


def test_without_a_part_every_evaluation_is_of_all(folder, capsys):
    assert call("train", *TINY[:-1], "--out=out/new") is None
    entries = log("out/new")
    assert len(entries) == 2
    assert all(entry["val_loss"] == entry["val_loss_part"] for entry in entries)
    assert f"validation loss {entries[-1]['val_loss']:.4f} (the best so far)" in (
        capsys.readouterr().out
    )


def fake_losses(monkeypatch, values):
    """Evaluations find these losses, one after the other, on a part; and 9 on all."""
    values = iter(values)

    def evaluate(model, data, batch_size, context, eval_tokens=None):
        return (9.0, 1) if eval_tokens is None else (next(values), 1)

    monkeypatch.setattr(train, "evaluate", evaluate)


def test_best_is_the_least_loss_on_the_part(folder, monkeypatch, capsys):
    """Losses rise again; and the loss on all, which is of other tokens, is no rival."""
    fake_losses(monkeypatch, [3.0, 2.0, 2.0, 2.5])
    flags = ["--max_steps=4", "--eval_interval=1", "--out=out/new"]
    assert call("train", *TINY, *flags) is None
    assert len(losses("out/new")) == 4
    assert len(checkpoint("out/new", "best.pt")["losses"]) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation" in line]
    assert ["(the best so far)" in line for line in lines] == [True, True, False, False]


def test_a_run_that_goes_on_knows_its_best(folder, monkeypatch):
    fake_losses(monkeypatch, [2.0, 2.5, 2.2, 1.9])
    flags = ["--max_steps=2", "--eval_interval=1", "--out=out/new"]
    assert call("train", *TINY, *flags) is None
    assert call("train", "--resume", "--out=out/new", "--max_steps=3") is None
    assert len(checkpoint("out/new", "best.pt")["losses"]) == 1
    assert call("train", "--resume", "--out=out/new", "--max_steps=4") is None
    assert len(checkpoint("out/new", "best.pt")["losses"]) == 4


def test_a_validation_loss_that_is_no_number_ends_the_run(folder, monkeypatch):
    fake_losses(monkeypatch, [2.0, math.nan])
    sentence = call("train", *TINY, "--eval_interval=1", "--out=out/new")
    assert "the loss or a weight is nan at step 2: training has diverged" in sentence
    assert len(losses("out/new")) == 1


# What a run says and writes -----------------------------------------------------------------------


def test_a_run_says_what_it_trains_and_how(folder, capsys):
    """A step is of 4 windows of 16 tokens."""
    assert call("train", *TINY, "--dtype=bfloat16", "--out=out/new") is None
    model, plan, *_ = capsys.readouterr().out.splitlines()
    size = sum(weights.numel() for weights in checkpoint("out/new")["model"].values())
    epochs = 6 * 64 / len(prepare.read_dataset("tiny")[1]["train"])
    assert model == (
        "model: qv attention, rope+agf positions, 1 layers, 2 heads, 16 wide: "
        f"{size:,} parameters, trained for 0 steps"
    )
    assert plan == (
        f"plan:  6 steps of 64 tokens, {epochs:.2g} epochs of tiny, on 1 x cpu, 1 threads, "
        "bfloat16, attention by torch"
    )


def test_products_are_of_the_precision_that_is_asked_for(folder):
    for dtype in "float32", "bfloat16":
        flags = ["--max_steps=1", f"--dtype={dtype}", f"--out=out/{dtype}"]
        assert call("train", *TINY, *flags) is None
    one, other = losses("out/float32"), losses("out/bfloat16")
    assert one != other and one == pytest.approx(other, rel=0.01)


def test_a_model_knows_the_characters_of_its_text(folder):
    assert checkpoint("out/run")["model_config"]["vocab_size"] == len(set(TEXT))


def test_what_a_run_logs(folder):
    """The training loss is the mean of the last 100 steps, or of all."""
    assert call("train", *TINY, "--out=out/new") is None
    found = losses("out/new")
    means = [entry["train_loss"] for entry in log("out/new")]
    assert means == pytest.approx([np.mean(found[:3]), np.mean(found[:6])])
    assert found == losses("out/run")
    flags = ["--max_steps=150", "--eval_interval=150"]
    assert call("train", "--resume", "--out=out/new", *flags) is None
    assert log("out/new")[-1]["train_loss"] == pytest.approx(np.mean(losses("out/new")[50:]))


def test_the_log_lies_beside_the_checkpoint(folder):
    lines = Path("out/run/log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == checkpoint("out/run")["log"]


def test_the_configuration_can_be_read(folder):
    config = json.loads(Path("out/run/config.json").read_text())
    assert config["train"]["max_steps"] == 6
    assert config["model"]["n_kv_head"] == 2, "sizes that follow from others are there"
    assert checkpoint("out/run")["model_config"]["n_kv_head"] is None


def test_a_line_stays_for_every_tenth_of_a_run(folder, capsys):
    flags = ["--max_steps=40", "--eval_interval=20", "--out=out/new"]
    assert call("train", *TINY, *flags) is None
    lines = re.findall(r"^step (\d+) of 40, 0:00:\d\d: (.*)$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _ in lines] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    mean = np.mean(losses("out/new")[:8])
    assert lines[1][1] == f"training loss {mean:.4f} (mean of the last 8 steps)"
    assert "validation loss" in lines[4][1] and "on 500 tokens" in lines[4][1]
    assert lines[-1][1].endswith("on all")


@pytest.mark.parametrize(
    "flags,name",
    [
        (["--attention=mla"], "tiny-mla-rope+agf"),
        (["--attention=qv", "--pos=rope"], "tiny-qv-rope"),
        (["--attention=qv", "--n_layer=2", "--seed=7"], "tiny-qv-rope+agf,n_layer=2,seed=7"),
        (["--attention=mla", "--device=cpu", "--threads=1", "--no-compile"], "tiny-mla-rope+agf"),
        (["--attention=gqa", "--no-rope_values"], "tiny-gqa-rope+agf,rope_values=False"),
    ],
    ids=str,
)
def test_a_run_is_named_after_the_flags_that_were_given(folder, flags, name):
    given = train.parse(["--dataset=tiny", *flags])
    assert train.name_run(given, *train.configure(given)) == Path("out", name)


def test_the_name_of_a_run_has_a_sane_length(folder):
    given = train.parse(TINY)
    numbers = [f"--{field}=1" for field in ("seed", "warmup_steps", "batch_size", "n_inner")]
    given |= train.parse([*numbers, "--attention=qv_ka", "--n_kv_head=1", "--d_ctx=16"])
    name = train.name_run(given, *train.configure(given)).name
    assert name.startswith("tiny-qv_ka-rope+agf,") and len(name) <= 120


def test_a_new_run_never_overwrites_an_old_one(folder):
    flags = [*TINY, "--attention=qv", "--pos=rope", "--max_steps=1"]
    assert call("train", *flags) is None
    first = max(Path("out").iterdir(), key=lambda path: path.stat().st_mtime)
    assert first.name.startswith("tiny-qv-rope,batch_size=4,")
    assert call("train", *flags) is None
    assert Path(f"{first}-2", "last.pt").exists()


def curves(figure):
    """{label: (steps, losses)} of what is drawn."""
    (axes,) = figure.axes
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def test_the_picture_shows_both_kinds_of_validation_loss():
    values = [4.0 - i / 100 for i in range(100)]
    entries = [{"step": step, "val_loss_part": 3.5 - step / 100} for step in (20, 60, 100)]
    entries[-1]["val_loss"] = 2.6
    assert curves(train.draw_losses(values, entries, 500)) == {
        "training": (list(range(6, 101)), values[5:]),
        "validation, the first 500 tokens": ([20, 60, 100], [3.3, 2.9, 2.5]),
        "validation, all tokens": ([100], [2.6]),
    }


def test_the_picture_of_a_run_whose_evaluations_are_of_all():
    entries = [{"step": step, "val_loss_part": 3.0, "val_loss": 3.0} for step in (1, 20)]
    found = curves(train.draw_losses([4.0] * 20, entries))
    assert found["validation, all tokens"] == ([20], [3.0]), "the first twentieth is left out"
    assert set(found) == {"training", "validation, all tokens"}


def test_the_picture_names_its_axes_and_its_curves():
    entries = [{"step": 20, "val_loss_part": 3.0, "val_loss": 3.0}]
    (axes,) = train.draw_losses([4.0] * 20, entries, 500).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss (nats a token)")
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training", "validation, all tokens", "validation, the first 500 tokens"]


def test_a_run_draws_its_own_losses(folder, saved_figures):
    assert call("train", *TINY, "--out=out/new") is None
    three, six = log("out/new")
    assert curves(*saved_figures) == {
        "training": ([1, 2, 3, 4, 5, 6], losses("out/new")),
        "validation, the first 500 tokens": (
            [3, 6],
            [three["val_loss_part"], six["val_loss_part"]],
        ),
        "validation, all tokens": ([6], [six["val_loss"]]),
    }


# The kernel ---------------------------------------------------------------------------------------


class PlainKernel:
    """Stands for kernel.py: attention by PyTorch, with answers that may be wrong."""

    def __init__(self, factor=1.0, gradient=1.0):
        self.factor, self.gradient = factor, gradient

    def attention(self, q, v, k=None, q_ctx=None, ctx=None, decay=None, scale=None):
        H, S = q.size(2), v.size(1)
        k = v if k is None else k
        v, k = (x.repeat_interleave(H // x.size(2), dim=2) for x in (v, k))
        scores = torch.einsum("bthd,bshd->bhts", q, k)
        if ctx is not None:
            scores = scores + torch.einsum("bthe,bse->bhts", q_ctx, ctx)
        scores = scores * (q.size(-1) ** -0.5 if scale is None else scale)
        if decay is not None:
            distance = (torch.arange(S)[:, None] - torch.arange(S)).clamp(min=0)
            scores = scores - decay[:, None, None] * torch.log1p(distance)
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
        y = self.factor * y
        return y.detach() + self.gradient * (y - y.detach())

    def decode(self, q, v, q_ctx=None, ctx=None, decay=None, lengths=None):
        raise RuntimeError("no decoding here")


def kernel_model(monkeypatch, kernel, attention="qv", **changes):
    monkeypatch.setitem(train.sys.modules, "kernel", kernel)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 30}
    return GPT(GPTConfig(attention=attention, pos="agf", **{**sizes, **changes}))


@pytest.mark.parametrize("attention", ["qkv", "qv"])
def test_a_kernel_that_computes_the_same_is_used(monkeypatch, attention):
    kernel = PlainKernel()
    network = kernel_model(monkeypatch, kernel, attention).train()
    assert train.choose_kernel(network, "triton", FLOAT32) == "triton"
    assert network.blocks[0].attention.kernel is kernel
    assert all(w.grad is None for w in network.parameters()), "the trial leaves no gradients"


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_without_being_asked_for_no_kernel_is_tried(monkeypatch, name):
    network = kernel_model(monkeypatch, None)
    assert train.choose_kernel(network, name, FLOAT32) == "torch"


@pytest.mark.parametrize(
    "kernel,training,changes,words",
    [
        (PlainKernel(factor=1.5), True, {}, "is off by"),
        (PlainKernel(factor=math.nan), True, {}, "the loss is off by nan%"),
        (PlainKernel(gradient=2.0), True, {}, "the gradient of"),
        (PlainKernel(), False, {}, "no decoding here"),
        (PlainKernel(), True, {"dropout": 0.5}, "dropout"),
    ],
    ids=["wrong", "nan", "wrong gradient", "fails", "dropout"],
)
def test_a_kernel_that_fails_is_refused_in_a_sentence(
    monkeypatch, kernel, training, changes, words
):
    network = kernel_model(monkeypatch, kernel, **changes).train(training)
    with pytest.raises(prepare.UserError) as refusal:
        train.choose_kernel(network, "triton", FLOAT32)
    sentence = str(refusal.value)
    assert sentence.startswith("--kernel=triton cannot be used here (") and words in sentence
    assert sentence.endswith("take --kernel=torch")
    assert network.blocks[0].attention.kernel is None
