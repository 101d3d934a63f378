"""sample.py as its users run it. How they misuse it is in test_misuse.py."""

import io
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call

import sample
from model import ATTENTIONS, CHECKPOINT_FORMAT, GPT, QV, GPTConfig
from model import sample as draw
from prepare import CharTokenizer, UserError

CHARS = "\n abdeghilnotuw"
TINY_MODEL = dict(vocab_size=len(CHARS), block_size=16, n_layer=2, n_head=2, n_embd=16)


def small_model(**flags):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**TINY_MODEL, **flags})).eval()


def save_run(name, steps=3, file="best.pt", chars=CHARS, **flags):
    """A checkpoint, as train.py writes it, of an untrained model."""
    model = small_model(vocab_size=len(chars), **flags)
    checkpoint = dict(
        format=CHECKPOINT_FORMAT,
        model=model.state_dict(),
        model_config=asdict(model.config),
        tokenizer=CharTokenizer(chars).spec,
        losses=[1.0] * steps,
    )
    path = Path("out", name, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return model


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The model of out/run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    save_run("run", file="last.pt")
    return save_run("run")


@pytest.fixture
def written(run, capsys):
    """A function that runs sample.py, and returns what it wrote to standard output."""

    def write(*flags):
        capsys.readouterr()
        assert call("sample", "--device=cpu", "--max_new_tokens=20", *flags) is None
        return capsys.readouterr().out

    return write


def test_a_trained_run_goes_on_from_a_prompt(folder, capsys):
    assert call("sample", "--prompt=hanging", "--max_new_tokens=20") is None
    text = capsys.readouterr().out
    assert text.startswith("hanging") and text.endswith("\n")
    assert len(text) == len("hanging") + 20 + 1


# The prompt ---------------------------------------------------------------------------------------


def test_a_prompt_from_a_file_is_the_same(written):
    Path("prompt.txt").write_text("hello")
    assert written("--prompt_file=prompt.txt") == written("--prompt=hello")


def test_a_prompt_from_standard_input_is_the_same(written, monkeypatch):
    expected = written("--prompt=hello")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert written("--prompt_file=-") == expected


def test_two_prompts_are_refused(run, capsys):
    assert call("sample", "--prompt=a", "--prompt_file=b.txt") == 2
    assert "not allowed with argument --prompt" in capsys.readouterr().err


def test_without_a_prompt_there_is_a_line_break(written):
    assert written() == written("--prompt=\n")


def test_without_a_prompt_a_model_that_knows_no_line_break_begins_with_what_it_knows(written):
    save_run("letters", chars="xyz")
    assert written("--out=out/letters")[0] == "x"


def test_a_prompt_longer_than_the_context_is_written_and_gone_on_from(written):
    assert written("--prompt=" + "unto all " * 9).startswith("unto all " * 9)


# The draws ----------------------------------------------------------------------------------------


def test_defaults():
    assert vars(sample.parse([])) == dict(
        out=None,
        prompt=None,
        prompt_file=None,
        num_samples=1,
        max_new_tokens=500,
        temperature=0.8,
        top_k=None,
        seed=1337,
        cache=True,
        device="auto",
        dtype="auto",
        kernel="auto",
        attention_map=None,
    )


def test_samples_differ(written):
    one, two = written("--num_samples=2").split("-" * 80 + "\n")
    assert one[0] == two[0] == "\n"
    assert len(one) == len(two) == 1 + 20 + 1
    assert one != two


def test_a_seed_repeats_a_text_and_another_does_not(written):
    assert written("--seed=1") == written("--seed=1") != written("--seed=2")


def test_the_text_is_the_same_without_a_cache(written):
    assert written("--no-cache") == written()


def test_without_a_cache_all_is_read_again_for_each_token(written, monkeypatch):
    read, forward = [], GPT.forward

    def counting(self, idx, *args, **options):
        read.append(idx.size(1))
        return forward(self, idx, *args, **options)

    monkeypatch.setattr(GPT, "forward", counting)
    written("--prompt=all", "--max_new_tokens=5")
    assert read[:5] == [3, 1, 1, 1, 1]
    read.clear()
    written("--prompt=all", "--max_new_tokens=5", "--no-cache")
    assert read[:5] == [3, 4, 5, 6, 7]


def test_temperature_zero_takes_the_likeliest_tokens(run, written):
    idx = torch.tensor([[0]])
    for _ in range(15):
        logits, _ = run(idx)
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert written("--temperature=0")[:16] == CharTokenizer(CHARS).decode(idx[0])


def test_the_likeliest_of_one_is_the_likeliest(written):
    assert written("--top_k=1", "--temperature=5") == written("--temperature=0")


def test_more_likeliest_tokens_than_there_are_is_all_of_them(written):
    assert written("--top_k=1000", "--temperature=5") == written("--temperature=5")


def test_a_lower_temperature_is_nearer_to_the_likeliest(written):
    assert written("--temperature=0.001") == written("--temperature=0")
    assert written("--temperature=2") != written("--temperature=0")


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


@pytest.mark.parametrize(
    "temperature, top_k, expected",
    [
        (1.0, None, LOGITS.softmax(-1)),
        (0.5, None, (LOGITS * 2).softmax(-1)),
        (2.0, None, (LOGITS / 2).softmax(-1)),
        (1.0, 4, LOGITS.softmax(-1)),
        (1.0, 9, LOGITS.softmax(-1)),
        (2.0, 2, torch.cat([(LOGITS[:, :2] / 2).softmax(-1), torch.zeros(1, 2)], dim=-1)),
        (0, None, torch.tensor([[1.0, 0.0, 0.0, 0.0]])),
    ],
)
def test_how_often_each_token_is_drawn(temperature, top_k, expected):
    """To five standard deviations of the mean of so many draws."""
    torch.manual_seed(0)
    drawn = draw(LOGITS.expand(40_000, -1), temperature, top_k)
    found = torch.bincount(drawn[:, 0], minlength=4) / 40_000
    deviation = (expected * (1 - expected) / 40_000).sqrt()
    assert ((found - expected).abs() <= 5 * deviation).all()


def test_products_are_of_the_precision_that_is_asked_for(said):
    """The cache shows it: in bfloat16 it takes half of the bytes."""
    assert "cache of 2,048 bytes, 128 a token" in said("--dtype=float32")[1]
    assert "cache of 1,024 bytes, 64 a token" in said("--dtype=bfloat16")[1]


# The text is written while it is made -------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode_bytes(self, ids):
        return bytes(ids.tolist())


def test_tokens_are_written_in_whole_characters(capsys):
    tokens = torch.tensor(list("小狗!".encode()) + [0xE5]).view(-1, 1, 1)
    sample.stream(tokens, Bytes())
    assert capsys.readouterr().out == "小狗!\N{REPLACEMENT CHARACTER}\n"


def test_a_token_is_written_before_the_next_is_made(monkeypatch):
    output, written = io.BytesIO(), []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output))

    def tokens():
        for char in b"abc":
            yield torch.tensor([[char]])
            written.append(output.getvalue())

    sample.stream(tokens(), Bytes())
    assert written == [b"a", b"ab", b"abc"]


def program(output):
    """sample.py as a process of its own, with much to write."""
    command = [sys.executable, ROOT / "sample.py", "--device=cpu", "--max_new_tokens=1e6"]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE)


def test_a_reader_may_leave(run):
    """As head does."""
    process = program(subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    (line,) = process.stderr.read().decode().splitlines()
    assert line.startswith("out/run/best.pt: ")
    assert process.wait(timeout=60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_the_output_is_a_sentence(run):
    with open("/dev/full", "w") as full:
        process = program(full)
        _, sentence = process.stderr.read().decode().splitlines()
    assert (
        sentence == "sample.py: the output cannot be written (the disk is full); make room for it"
    )
    assert process.wait(timeout=60) == 1


# Which checkpoint is read, and what is said of it -------------------------------------------------


@pytest.fixture
def said(run, capsys):
    """A function that runs sample.py, and returns the lines that it wrote to standard error."""

    def say(*flags):
        capsys.readouterr()
        assert call("sample", "--max_new_tokens=2", "--device=cpu", *flags) is None
        return capsys.readouterr().err.splitlines()

    return say


def test_layers_width_and_steps_of_what_is_read(said):
    save_run("small", steps=1234, attention="gqa", pos="rope")
    assert (
        said("--out=out/small")[0] == "out/small/best.pt: gqa, rope, 2 layers, 16 wide, 1,234 steps"
    )


def test_the_newest_run_is_read(said):
    save_run("newer", file="last.pt")
    save_run("compare/newest", file="last.pt")
    assert said()[0].startswith("out/newer/last.pt: ")


def test_the_best_checkpoint_is_read_and_a_later_one_is_mentioned(said):
    save_run("run", steps=10, file="last.pt")
    assert said()[0].endswith("3 steps; last.pt has 10 steps, take it by --out=out/run/last.pt")


def test_a_last_checkpoint_that_is_the_best_is_not_mentioned(said):
    assert said()[0].endswith("16 wide, 3 steps")


def test_one_checkpoint_can_be_asked_for(said):
    save_run("run", steps=10, file="last.pt")
    assert said("--out=out/run/last.pt")[0].startswith("out/run/last.pt: ")


def test_a_run_that_was_never_validated_has_its_last_checkpoint_read(said):
    Path("out/run/best.pt").unlink()
    assert said()[0].startswith("out/run/last.pt: ")


def test_a_damaged_last_pt_does_not_matter_beside_a_good_best_pt(said):
    save_run("run")
    Path("out/run/last.pt").write_bytes(b"words")
    assert said()[0].startswith("out/run/best.pt: ")


def test_what_it_cost_is_said_at_the_end(said):
    """A cache of 2 layers for 16 tokens: here 2 keys and 2 values of width 8, in 4 bytes."""
    save_run("small", attention="qkv")
    line = said("--out=out/small")[1]
    assert line.startswith("2 tokens in ") and " tokens/s; " in line
    assert line.endswith("cache of 4,096 bytes, 256 a token; attention by torch")
    assert said("--out=out/small", "--no-cache")[1].endswith("; no cache; attention by torch")


def test_tokens_a_second_are_of_all_texts(said, monkeypatch):
    """By a made-up clock, on which each token takes half a second."""
    clock, generate = types.SimpleNamespace(now=0.0), GPT.generate
    clock.perf_counter = lambda: clock.now

    def slowly(*args):
        for token in generate(*args):
            clock.now += 0.5
            yield token

    monkeypatch.setattr(sample, "time", clock)
    monkeypatch.setattr(GPT, "generate", slowly)
    line = said("--num_samples=3", "--max_new_tokens=20")[1]
    assert line.startswith("60 tokens in 30.0 s, 2 tokens/s; ")


# What the heads attend to -------------------------------------------------------------------------


class Keyless(QV):
    """A fork's attention: its query is another."""

    def query(self, x):
        return super().query(x).roll(1, dims=-1)


VARIANTS = [
    *[dict(attention=name, pos="rope+agf") for name in ATTENTIONS],
    *[dict(attention="qkv", pos=pos) for pos in ("learned", "sinusoidal", "rope", "agf")],
    dict(attention="qv_ka", pos="agf"),
    dict(attention="qv", pos="rope", n_kv_head=1),
    dict(attention="keyless", pos="rope"),
]


@pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: " ".join(map(str, flags.values())))
def test_attention_weights_mix_the_values_as_attention_does(flags, monkeypatch):
    """In the last layer, which depends on all that is before it."""
    monkeypatch.setitem(ATTENTIONS, "keyless", Keyless)
    model, idx = small_model(**flags), torch.arange(7)[None]
    weights = sample.attention_weights(model, idx)
    assert weights.shape == (2, 2, 7, 7)
    assert torch.equal(weights, weights.tril()), "no token sees a later one"

    seen = []
    attention = model.blocks[-1].attention
    attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    attention.out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(idx)
        x, expected = seen
        _, values = attention.read(attention.query(x), attention.write(x, 0), 0)
        values = values.repeat_interleave(2 // values.size(2), dim=2)
        mixed = torch.einsum("hts,bshd->bthd", weights[-1], values)
        torch.testing.assert_close(attention.finish(mixed, 0).flatten(2), expected)


def test_attention_weights_leave_the_model_as_it_was():
    model = small_model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    sample.attention_weights(model, torch.arange(7)[None])
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


PROMPT = "what light"


@pytest.fixture
def figure():
    model, tokenizer = small_model(n_layer=3), CharTokenizer(CHARS)
    idx = torch.tensor(tokenizer.encode(PROMPT))[None]
    return sample.draw_attention(model, tokenizer, idx), sample.attention_weights(model, idx)


def test_an_attention_map_has_a_square_for_each_layer_and_head(figure):
    squares, weights = figure[0].axes[:6], figure[1]
    for number, axes in enumerate(squares):
        layer, head = number // 2, number % 2
        assert axes.get_title() == f"layer {layer + 1}, head {head + 1}"
        assert torch.equal(torch.tensor(axes.images[0].get_array()), weights[layer, head])


def test_layers_of_an_attention_map_lie_below_one_another_and_heads_side_by_side(figure):
    figure[0].draw_without_rendering()
    one, two, three = (figure[0].axes[number].get_position() for number in (0, 1, 2))
    assert one.y0 == pytest.approx(two.y0) and three.y1 < one.y0
    assert one.x0 == pytest.approx(three.x0) and one.x1 < two.x0


def test_an_attention_map_has_the_first_token_at_the_top_and_on_the_left(figure):
    axes = figure[0].axes[0]
    for labels in axes.get_xticklabels(), axes.get_yticklabels():
        assert [label.get_text() for label in labels] == list(PROMPT)
        assert [round(sum(label.get_position())) for label in labels] == list(range(10))
    left, right, bottom, top = axes.images[0].get_extent()
    assert left < right and top < bottom and axes.yaxis_inverted()
    assert axes.images[0].origin == "upper"


def test_an_attention_map_says_of_which_model_it_is_and_how_to_read_it(figure):
    expected = "qv, rope+agf\nhow much each token (a row) attends to each (a column)"
    assert figure[0].get_suptitle() == expected


def test_an_attention_map_s_colours_are_of_one_scale(figure):
    assert {axes.images[0].get_clim() for axes in figure[0].axes[:6]} == {(0, 1)}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a", "a"),
        ("é", "é"),
        ("$x^", "$x^"),
        ("\n", "\\n"),
        ("\r", "\\r"),
        ("\0", "\\x00"),
        ("一", "U+4E00"),
        (" 小狗", " U+5C0FU+72D7"),
        ("\N{DOG FACE}", "U+1F436"),
    ],
)
def test_labels_show_what_has_no_sign(text, expected):
    assert sample.label(text) == expected


@pytest.mark.filterwarnings("error")
def test_a_map_of_signs_that_the_font_lacks_is_drawn_without_a_warning(tmp_path):
    tokenizer = CharTokenizer("\r\n$^_{}\\一小狗")
    model = small_model(vocab_size=tokenizer.vocab_size)
    figure = sample.draw_attention(model, tokenizer, torch.arange(11)[None])
    figure.savefig(tmp_path / "map.png")


class Formula:
    """A tokenizer all of whose tokens look like a formula that is none."""

    def decode(self, ids):
        return "$^$"


def test_a_token_is_not_read_as_a_formula(tmp_path):
    figure = sample.draw_attention(small_model(), Formula(), torch.arange(5)[None])
    figure.savefig(tmp_path / "map.png")
    assert figure.axes[0].get_xticklabels()[0].get_text() == "$^$"


def test_a_long_prompt_has_no_labels():
    model, tokenizer = small_model(block_size=64), CharTokenizer(CHARS)
    figure = sample.draw_attention(model, tokenizer, torch.zeros(1, 49, dtype=torch.int64))
    assert figure.axes[0].get_xticklabels() == []


@pytest.mark.parametrize("length", [1, 17])
def test_a_prompt_that_does_not_fit_is_refused(length):
    model, tokenizer = small_model(), CharTokenizer(CHARS)
    with pytest.raises(UserError, match=f"takes a prompt of 2 to 16 tokens.*this one has {length}"):
        sample.draw_attention(model, tokenizer, torch.zeros(1, length, dtype=torch.int64))


def test_an_attention_map_is_a_picture_and_no_text_is_written(written):
    assert written(f"--prompt={PROMPT}", "--attention_map=new/map.png") == (
        "new/map.png: attention weights over 10 tokens\n"
    )
    assert Path("new/map.png").read_bytes().startswith(b"\x89PNG")
