"""sample.py as its users run it. How they misuse it is in test_misuse.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, call

import model
import sample
from model import ATTENTIONS, GPT


def test_prompts_from_everywhere(folder, capsys, monkeypatch):
    Path("prompt.txt").write_text("hanging")
    texts = []
    for flags in (
        ["--prompt=hanging"],
        ["--prompt_file=prompt.txt"],
        ["--prompt_file=-"],
        ["--prompt=hanging", "--no-cache"],
    ):
        monkeypatch.setattr(sys, "stdin", open("prompt.txt"))
        assert call("sample", *flags, "--max_new_tokens=20", "--device=cpu") is None
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert (
            "cache of 2,048 bytes, 128 a token" if flags[-1] != "--no-cache" else "no cache"
        ) in captured.err
    assert (
        texts == [texts[0]] * 4
        and texts[0].startswith("hanging")
        and len(texts[0]) == len("hanging") + 20 + 1
    )
    assert call("sample", "--prompt=hanging", "--max_new_tokens=20", "--seed=2") is None
    assert capsys.readouterr().out != texts[0]


def test_samples_differ_and_without_a_prompt_begin_with_a_line_break(folder, capsys):
    assert call("sample", "--num_samples=2", "--max_new_tokens=9") is None
    one, two = capsys.readouterr().out.split("-" * 80 + "\n")
    assert one[0] == two[0] == "\n" and one != two and len(one) == len(two) == 11


def test_tokens_are_written_in_whole_characters(capsys):
    class Bytes:
        def decode(self, ids):
            return bytes(ids)

    tokens = torch.tensor(list("小狗!".encode()) + [0xE5])
    assert sample.stream((token.view(1, 1) for token in tokens), Bytes()) >= 0
    assert capsys.readouterr().out == "小狗!\N{REPLACEMENT CHARACTER}\n"


def test_a_reader_may_leave(folder):
    command = [sys.executable, ROOT / "sample.py", "--max_new_tokens=1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 1


def test_sampling_takes_the_newest_run_and_its_best(folder, capsys):
    assert call("train", *TINY, "--attention=gqa", "--out=out/newer") is None
    Path("out/newer/last.pt").write_text("this is not read")
    Path("out/compare/newest").mkdir(parents=True)
    Path("out/compare/newest/last.pt").write_text("nor is this, a run of compare.py")
    assert call("sample", "--max_new_tokens=2") is None
    assert "gqa, agf, out/newer" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_maps_of_every_variant(attention):
    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=9, n_layer=2, n_head=2, n_embd=16)
    network = GPT(model.GPTConfig(attention=attention, pos="rope", **shape)).eval()
    weights = sample.attention_weights(network, torch.arange(7)[None])
    assert weights.shape == (2, 2, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7))
    assert torch.equal(weights, weights.tril())
    attention, x = (
        network.blocks[0].attention,
        network.blocks[0].ln_1(network.wte(torch.arange(7)[None])),
    )
    q, memory = attention.query(x, 0), attention.write(x, 0)
    values = attention.read(q, memory)[2]
    values = values.repeat_interleave(2 // values.size(2), dim=2)
    mixed = torch.einsum("hts,bshd->bthd", weights[0], values)  # what attention mixes by them
    mixed = attention.rotate(mixed, 0, turn=-1) if isinstance(attention, model.QV) else mixed
    torch.testing.assert_close(mixed, attention.mix(q, memory))


def test_an_attention_map_is_a_picture(folder, capsys):
    assert "'$' (number 9 of the text) is not among" in call(
        "sample", "--prompt=bottles $", "--attention_map=map.png"
    )
    assert call("sample", "--prompt=bottles", "--attention_map=map.png") is None
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "map.png: 1 layers x 2 heads over 7 tokens\n"


def test_a_dollar_is_drawn_as_it_is(folder, capsys):
    """Not read as a formula, which `$^$` is not."""
    Path("dollars.txt").write_text("$^$_{}\\" * 400)
    assert call("prepare", "dollars.txt") is None
    assert call("train", "--dataset=dollars", *TINY[1:], "--out=out/$^$", "--max_steps=3") is None
    assert call("sample", "--prompt=$^$_{}\\", "--attention_map=map.png") is None
