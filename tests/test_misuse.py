"""How the programs are misused, and what breaks: each case gets one sentence, a non-zero exit, and no file changes."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, call, misused

import model

HOLD = """
import sqlite3, sys
lock = sqlite3.connect("out/run/lock")
lock.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def in_use():
    """Another process has out/run, until the function that this returns is called."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"locked\n"
    return process.communicate


def other_text(text):
    Path("tiny.txt").write_text(text)
    call("prepare", "tiny.txt")


def other_tokens(split, count):
    """Gives the first `count` tokens of a split other values, which the vocabulary has."""
    path = Path("data/tiny", f"{split}.bin")
    ids = np.fromfile(path, np.uint16)
    ids[:count] = (ids[:count] + 1) % 20
    ids.tofile(path)


def other_meta(**changes):
    path = Path("data/tiny/meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What damages a checkpoint, each a function of its path ---------------------------------------------------------------


def change(**changes):
    """Gives it other contents: a value, or a function of the value before."""

    def damage(path):
        old = torch.load(path, weights_only=True)
        torch.save(
            {**old, **{k: new(old[k]) if callable(new) else new for k, new in changes.items()}},
            path,
        )

    return damage


def overwrite(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] + bytes(200) + raw[len(raw) // 2 + 200 :])


def archive(path):
    path.unlink()
    shutil.make_archive("archive", "zip", "data")
    Path("archive.zip").rename(path)


def replace(make):
    return lambda path: (path.unlink(), make(path))


def other_config(**changes):
    return change(model_config=lambda config: {**config, **changes})


def one_weight(number):
    """One row of one matrix has this number."""
    row = torch.tensor(3)
    return change(
        model=lambda model: {**model, "wte.weight": model["wte.weight"].index_fill(0, row, number)}
    )


NAME = "blocks.0.mlp.up.weight"
BROKEN = {
    "a weight that is NaN": one_weight(math.nan),
    "a weight that is infinite": one_weight(math.inf),
    "weights cut off": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "nothing": lambda path: path.write_bytes(b""),
    "200 bytes of zeros in": overwrite,
    "a text": lambda path: path.write_text("hello"),
    "another zip file": archive,
    "a list": lambda path: torch.save([1, 2], path),
    "no tensors": lambda path: torch.save({"format": model.CHECKPOINT_FORMAT, "model": {}}, path),
    "code": lambda path: torch.save(print, path),
    "an older format": change(format=2),
    "a number for losses": change(losses=3),
    "weights of another shape": other_config(n_embd=32),
    "numbers for weights": change(model={"wte.weight": 3}),
    "an unknown option": other_config(mine=3),
    "a word for a number": other_config(n_layer="two"),
    "an unknown tokenizer": change(tokenizer={"kind": "words"}),
    "a larger tokenizer": change(tokenizer={"kind": "gpt2"}),
    "no optimizer": change(optimizer={}),
    "an optimizer that lacks a matrix": change(
        optimizer=lambda o: {k: v for k, v in o.items() if k != NAME}
    ),
    "an optimizer of another shape": change(
        optimizer=lambda o: {**o, NAME: {k: torch.ones(3, 3) for k in o[NAME]}}
    ),
    "an optimizer that has forgotten": change(optimizer=lambda o: {k: {} for k in o}),
    "an optimizer of another type": change(optimizer=lambda o: {**o, NAME: [1, 2]}),
}
NO_FILE = {
    "a folder": replace(Path.mkdir),
    "a pipe": replace(os.mkfifo),
    "a link to /dev/zero": replace(lambda path: path.symlink_to("/dev/zero")),
}

DAMAGE = {
    "in use": in_use,
    "other tokenizer": lambda: other_text(TEXT + "~"),
    "other text": lambda: other_text(TEXT[::-1]),
    "another tiny.txt": lambda: (
        Path("other").mkdir(),
        Path("other/tiny.txt").write_text(TEXT[::-1]),
    ),
    "standard input": lambda: (
        other_meta(source="standard input"),
        shutil.copytree("data/tiny", "data/-"),
    ),
    "taken name": lambda: Path("pydoc.txt").write_text(TEXT),
    "other training tokens": lambda: other_tokens("train", None),
    "another training token": lambda: other_tokens("train", 1),
    "another validation token": lambda: other_tokens("val", 1),
    "truncated data": lambda: Path("data/tiny/train.bin").write_bytes(
        Path("data/tiny/train.bin").read_bytes()[:-4]
    ),
    "half a token": lambda: Path("data/tiny/train.bin").write_bytes(
        Path("data/tiny/train.bin").read_bytes()[:-1]
    ),
    "foreign tokens": lambda: Path("data/tiny/val.bin").write_bytes(
        b"\xff" * Path("data/tiny/val.bin").stat().st_size
    ),
    "missing data": lambda: Path("data/tiny/val.bin").unlink(),
    "truncated meta": lambda: Path("data/tiny/meta.json").write_text('{"tokenizer": '),
    "meta of an unknown tokenizer": lambda: other_meta(tokenizer={"kind": "words"}),
    "meta without tokenizer": lambda: other_meta(tokenizer=None),
    "meta without characters": lambda: other_meta(tokenizer={"kind": "char"}),
    "meta without sums": lambda: Path("data/tiny/meta.json").write_text(
        '{"tokenizer": {"kind": "gpt2"}}'
    ),
    "list for meta": lambda: Path("data/tiny/meta.json").write_text("[]"),
    "no runs": lambda: shutil.rmtree("out"),
    "short text": lambda: (
        Path("short.txt").write_text("abcdefghij" * 3),
        call("prepare", "short.txt"),
    ),
    "empty text": lambda: Path("empty.txt").write_text(""),
    "ten letters": lambda: Path("short.txt").write_text("abcdefghij"),
    "binary text": lambda: Path("binary.txt").write_bytes(b"abc\xff\xfe" * 50),
    "other input.txt": lambda: (
        Path("data/shakespeare_char").mkdir(),
        Path("data/shakespeare_char/input.txt").write_text(TEXT),
    ),
    "file for data": lambda: (shutil.rmtree("data"), Path("data").write_text("")),
    "file for folder": lambda: Path("taken").write_text(""),
    "file for out": lambda: (shutil.rmtree("out"), Path("out").write_text("")),
    "folder for picture": lambda: Path("map.png").mkdir(),
    "unknown attention": lambda: other_config(attention="mine")(Path("out/run/best.pt")),
    **{
        f"{file} is {name}": functools.partial(damage, Path("out/run", file))
        for file in ("last.pt", "best.pt")
        for name, damage in {**BROKEN, **NO_FILE}.items()
    },
    None: lambda: None,
}
NEW = [*TINY, "--out=out/new"]
RESUME = ["--resume", "--out=out/run", "--max_steps=9"]

MISUSE = [
    # program, flags, what is damaged before, words of the sentence
    # What would lose work
    (
        "train",
        [*TINY, "--out=out/run"],
        None,
        "out/run holds a run already; go on with it by --resume, or choose",
    ),
    (
        "train",
        [*TINY, "--out=out/run"],
        "in use",
        "out/run is in use or cannot be written (database is locked)",
    ),
    ("train", RESUME, "in use", "out/run is in use or cannot be written (database is locked)"),
    (
        "train",
        RESUME,
        "other tokenizer",
        "data set 'tiny' is not the one that out/run was trained on",
    ),
    ("train", RESUME, "other text", "data set 'tiny' is not the one that out/run was trained on"),
    (
        "train",
        [*RESUME, "--n_embd=32"],
        None,
        "--n_embd=32 cannot change a run in the middle, which has 16",
    ),
    ("train", [*RESUME, "--eval_tokens=9"], None, "--eval_tokens=9 cannot change a run"),
    (
        "train",
        [*RESUME, "--optimizer=adamw"],
        None,
        "--optimizer=adamw cannot change a run in the middle",
    ),
    *[
        (
            "train",
            RESUME,
            f"last.pt is {name}",
            "out/run/last.pt is damaged, or of another model.py",
        )
        for name in BROKEN
    ],
    *[
        ("train", RESUME, f"last.pt is {name}", "there is no checkpoint out/run/last.pt; --out")
        for name in NO_FILE
    ],
    (
        "prepare",
        ["other/tiny.txt"],
        "another tiny.txt",
        "would be lost; rename the file, or add --overwrite",
    ),
    ("prepare", ["-"], "standard input", "data/- was made of"),
    ("prepare", ["pydoc.txt"], "taken name", "would overwrite the data set 'pydoc'"),
    # Data that is not what was written
    *[
        ("train", flags, damage, "(its tokens are not those that were written; prepared are: tiny)")
        for flags in (NEW, RESUME)
        for damage in (
            "other training tokens",
            "another training token",
            "another validation token",
        )
    ],
    (
        "train",
        NEW,
        "truncated data",
        "(its tokens are not those that were written; prepared are: tiny)",
    ),
    ("train", NEW, "half a token", "data set 'tiny' is missing or damaged"),
    (
        "train",
        NEW,
        "foreign tokens",
        "(its tokens are not those that were written; prepared are: tiny)",
    ),
    (
        "train",
        NEW,
        "missing data",
        "No such file or directory: 'data/tiny/val.bin'; prepared are: tiny)",
    ),
    ("train", NEW, "truncated meta", "data set 'tiny' is missing or damaged"),
    (
        "train",
        NEW,
        "meta of an unknown tokenizer",
        "data set 'tiny' is missing or damaged ('words'",
    ),
    ("train", NEW, "meta without tokenizer", "data set 'tiny' is missing or damaged"),
    ("train", NEW, "meta without characters", "vocab_size=0 must be at least 1"),
    ("train", NEW, "meta without sums", "data set 'tiny' is missing or damaged ('sha256'"),
    ("train", NEW, "list for meta", "data set 'tiny' is missing or damaged"),
    ("train", [*NEW, "--dataset=data/tiny"], None, "data set 'data/tiny' is missing or damaged"),
    ("train", [*NEW, "--dataset=nowhere"], None, "data set 'nowhere' is missing or damaged"),
    ("train", [*NEW, "--dataset=openwebtext"], None, "run: python prepare.py openwebtext"),
    ("train", [*NEW, "--block_size=100000"], None, "block_size=100000 must be less than"),
    (
        "train",
        [*NEW, "--dataset=short", "--block_size=32"],
        "short text",
        "block_size=32 must be less than the 27",
    ),
    # train.py: a folder that cannot be had
    (
        "train",
        [*TINY, "--out=taken/run"],
        "file for folder",
        "taken/run is in use or cannot be written (Not a",
    ),
    (
        "train",
        TINY,
        "file for out",
        "out/tiny-qv_ka-agf is in use or cannot be written (Not a directory)",
    ),
    (
        "train",
        ["--resume", "--out=out/nowhere"],
        None,
        "there is no checkpoint out/nowhere/last.pt",
    ),
    (
        "train",
        ["--resume", "--out=out"],
        None,
        "there is no checkpoint out/last.pt; --out takes the folder of a run",
    ),
    ("train", ["--resume"], "no runs", "there is no run in out/"),
    # train.py: flags
    ("train", [*NEW, "--attentoin=qv"], None, "unrecognized arguments: --attentoin=qv"),
    ("train", [*NEW, "--attention=qkw"], None, "argument --attention: invalid choice: 'qkw'"),
    ("train", [*NEW, "--optimizer=sgd"], None, "argument --optimizer: invalid choice: 'sgd'"),
    ("train", [*NEW, "--dtype=float8"], None, "invalid choice: 'float8'"),
    ("train", [*NEW, "--preset=huge"], None, "invalid choice: 'huge'"),
    ("train", [*NEW, "--kernel=triton"], None, "--kernel=triton cannot be used here"),
    ("train", [*NEW, "--device=cuda:99"], None, "--device=cuda:99 cannot be used here"),
    ("train", [*NEW, "--device=toaster"], None, "--device=toaster cannot be used here"),
    ("train", [*NEW, "--n_layer=two"], None, "argument --n_layer: invalid whole value: 'two'"),
    ("train", [*NEW, "--max_steps=2.5"], None, "argument --max_steps: 2.5 must be a whole number"),
    (
        "train",
        [*NEW, "--n_embd=1e30"],
        None,
        "argument --n_embd: 1e30 must be a whole number below 2**53",
    ),
    ("train", [*NEW, "--n_layer=0"], None, "n_layer=0 must be at least 1"),
    ("train", [*NEW, "--max_steps=0"], None, "max_steps=0 must be at least 1"),
    ("train", [*NEW, "--threads=0"], None, "threads=0 must be at least 1"),
    (
        "train",
        [*NEW, "--n_head=3"],
        None,
        "n_embd=16 must be a multiple of n_head=3, for example 18",
    ),
    ("train", [*NEW, "--attention=gqa", "--n_kv_head=5"], None, "n_kv_head=5 must divide n_head=2"),
    (
        "train",
        [*NEW, "--attention=qkv", "--n_kv_head=1"],
        None,
        "--n_kv_head counts only with --attention=gqa",
    ),
    (
        "train",
        [*NEW, "--attention=mla", "--d_rope=8"],
        None,
        "--d_rope counts only with --pos=rope; leave it out",
    ),
    (
        "train",
        [*NEW, "--attention=qv", "--shared_wk"],
        None,
        "--shared_wk counts only with --attention=qv_ka",
    ),
    ("train", [*NEW, "--pos=rope", "--n_embd=18"], None, "n_embd=18 gives heads of odd width 9"),
    ("train", [*NEW, "--dropout=1.5"], None, "dropout=1.5 must lie in [0, 1)"),
    ("train", [*NEW, "--learning_rate=-1"], None, "learning_rate=-1.0 must be at least 0"),
    (
        "train",
        [*NEW, "--learning_rate=nan"],
        None,
        "learning_rate=nan must be at least 0, and less than",
    ),
    ("train", [*NEW, "--beta2=1"], None, "beta2=1.0 must be at least 0, and less than 1"),
    ("train", [*NEW, "--seed=-1"], None, "seed=-1 must be at least 0"),
    (
        "train",
        [*NEW, "--micro_batch_size=3"],
        None,
        "batch_size=4 must be a multiple of 3, micro_batch_size x",
    ),
    ("train", [*NEW, "--micro_batch_size=8"], None, "batch_size=4 must be a multiple of 8"),
    ("train", [*NEW, "--batch_size=1e15"], None, "must be at least 1, and less than 1048576"),
    ("train", [*NEW, "--n_embd=10000000000000"], None, "memory ran out; lower --micro_batch_size"),
    # prepare.py
    ("prepare", [], None, "the following arguments are required: NAME"),
    (
        "prepare",
        ["nowhere.txt"],
        None,
        "nowhere.txt cannot be read as UTF-8 text (No such file or directory",
    ),
    ("prepare", ["data"], None, "data cannot be read as UTF-8 text (Is a directory"),
    ("prepare", ["empty.txt"], "empty text", "empty.txt is too short to be split"),
    (
        "prepare",
        ["short.txt"],
        "ten letters",
        "short.txt is too short to be split (tokens: {'train': 9, 'val': 1})",
    ),
    (
        "prepare",
        ["binary.txt"],
        "binary text",
        "cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xff",
    ),
    (
        "prepare",
        ["shakespeare_char"],
        "other input.txt",
        "data/shakespeare_char/input.txt is not tiny Shakespeare",
    ),
    ("prepare", ["tiny.txt"], "file for data", "data/tiny could not be written"),
    (
        "prepare",
        ["tiny.txt", "--tokens=5"],
        None,
        "--tokens for openwebtext; leave it out for tiny.txt",
    ),
    (
        "prepare",
        ["shakespeare_char", "--tokenizer=gpt2"],
        None,
        "--tokenizer is for a text of your own",
    ),
    (
        "prepare",
        ["openwebtext", "--tokens=-5"],
        None,
        "--tokens=-5 must be at least 1, for example 1e9",
    ),
    ("prepare", ["openwebtext", "--tokens=inf"], None, "inf must be a whole number"),
    (
        "prepare",
        ["openwebtext", "--tokens=many"],
        None,
        "argument --tokens: invalid whole value: 'many'",
    ),
    ("prepare", ["tiny.txt", "--tokenizer=words"], None, "invalid choice: 'words'"),
    # sample.py
    *[
        ("sample", [], f"best.pt is {name}", "out/run/best.pt is damaged, or of another model.py")
        for name in BROKEN
    ],
    *[
        ("sample", [], f"best.pt is {name}", "there is no checkpoint out/run/best.pt")
        for name in NO_FILE
    ],
    ("sample", [], "unknown attention", "attention='mine' is unknown"),
    ("sample", ["--out=out/nowhere"], None, "there is no checkpoint out/nowhere/last.pt"),
    (
        "sample",
        ["--out=out/run/best.pt"],
        None,
        "there is no checkpoint out/run/best.pt/last.pt; --out",
    ),
    ("sample", [], "no runs", "there is no run in out/"),
    ("sample", ["--prompt=naïve"], None, "character 'ï' (number 3 of the text) is not among the"),
    ("sample", ["--prompt="], None, "the prompt is empty"),
    (
        "sample",
        ["--prompt=a", "--prompt_file=tiny.txt"],
        None,
        "--prompt and --prompt_file exclude each other",
    ),
    ("sample", ["--prompt_file=nowhere.txt"], None, "nowhere.txt cannot be read"),
    (
        "sample",
        ["--prompt_file=binary.txt"],
        "binary text",
        "binary.txt cannot be read as UTF-8 text",
    ),
    ("sample", ["--temperature=-1"], None, "--temperature=-1.0 must be at least 0"),
    ("sample", ["--temperature=nan"], None, "--temperature=nan must be at least 0"),
    ("sample", ["--top_k=0"], None, "--top_k=0 must be at least 1"),
    ("sample", ["--max_new_tokens=0"], None, "--max_new_tokens=0 must be at least 1"),
    ("sample", ["--num_samples=0"], None, "--num_samples=0 must be at least 1"),
    ("sample", ["--kernel=triton"], None, "--kernel=triton cannot be used here"),
    ("sample", ["--device=toaster"], None, "--device=toaster cannot be used here"),
    ("sample", ["--attention_map=a.pdf"], None, "--attention_map=a.pdf must end in .png"),
    ("sample", ["--prompt=a", "--attention_map=map.png"], None, "takes a prompt of 2 to 16 tokens"),
    (
        "sample",
        ["--prompt=hanging on the wall", "--attention_map=map.png"],
        None,
        "and this one has 19",
    ),
    (
        "sample",
        ["--prompt=wall", "--attention_map=map.png"],
        "folder for picture",
        "map.png could not be written",
    ),
    (
        "sample",
        ["--prompt=wall", "--attention_map=taken/map.png"],
        "file for folder",
        "map.png could not be written",
    ),
]


@pytest.mark.parametrize(
    "program,flags,damage,words",
    MISUSE,
    ids=[f"{program} {damage or ' '.join(flags[-1:])}" for program, flags, damage, _ in MISUSE],
)
def test_misuse_gets_one_sentence(folder, capsys, program, flags, damage, words):
    undo = DAMAGE[damage]()
    misused(capsys, program, flags, words)
    if damage == "in use":
        undo()


@pytest.mark.parametrize(
    "program,flags,name", [("train", RESUME, "last.pt"), ("sample", [], "best.pt")]
)
def test_an_unreadable_checkpoint_is_not_called_damaged(
    folder, capsys, monkeypatch, program, flags, name
):
    def forbidden(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model.zipfile, "ZipFile", forbidden)
    misused(capsys, program, flags, f"out/run/{name} cannot be read (Permission denied); mend that")
