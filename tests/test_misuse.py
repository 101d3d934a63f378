"""How the programs are misused, and what breaks: each case gets one sentence that says what to do,
a non-zero exit, and no file changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS, TEXT, TINY, call, misused

NEW = [*TINY, "--out=out/new"]
RESUME = ["--resume", "--out=out/run", "--max_steps=9"]
KERNEL = ["--kernel=triton", "--device=cpu"]

# Flags --------------------------------------------------------------------------------------------

TRAIN_FLAGS = [
    # what is given beside NEW, and words of the sentence
    ("--attentoin=qv", "--attentoin=qv; is --attentoin meant to be --attention?"),
    ("--n_lay=2", "unrecognized arguments: --n_lay=2; is --n_lay meant to be --n_layer?"),
    ("--lr=2", "unrecognized arguments: --lr=2; see "),
    ("--attention=qkw", "argument --attention: invalid choice: 'qkw'"),
    ("--optimizer=sgd", "argument --optimizer: invalid choice: 'sgd'"),
    ("--dtype=float8", "argument --dtype: invalid choice: 'float8'"),
    ("--preset=huge", "argument --preset: invalid choice: 'huge'"),
    ("--compile=maybe", "argument --compile: maybe must be True or False"),
    ("--kernel=triton", "--kernel=triton cannot be used here ("),
    ("--device=cuda:99", "--device=cuda:99 cannot be used here ("),
    ("--device=toaster", "--device=toaster cannot be used here ("),
    ("--n_layer=two", "argument --n_layer: "),
    ("--max_steps=2.5", "argument --max_steps: 2.5 must be a whole number"),
    ("--n_embd=1e30", "argument --n_embd: 1e30 must be a whole number"),
    ("--n_embd=10000000000000", "memory ran out; lower --micro_batch_size"),
    ("--n_layer=0", "n_layer=0 must be at least 1"),
    ("--max_steps=0", "max_steps=0 must be a number of at least 1"),
    ("--batch_size=0", "batch_size=0 must be a number of at least 1"),
    ("--eval_interval=0", "eval_interval=0 must be a number of at least 1"),
    ("--eval_tokens=0", "eval_tokens=0 must be a number of at least 1"),
    ("--threads=0", "threads=0 must be a number of at least 1"),
    ("--seed=-1", "seed=-1 must be a number of at least 0"),
    ("--learning_rate=-1", "learning_rate=-1.0 must be a number of at least 0"),
    ("--learning_rate=nan", "learning_rate=nan must be a number of at least 0"),
    ("--learning_rate=inf", "learning_rate=inf must be a number of at least 0"),
    ("--weight_decay=-1", "weight_decay=-1.0 must be a number of at least 0"),
    ("--grad_clip=-1", "grad_clip=-1.0 must be a number of at least 0"),
    ("--warmup_steps=-1", "warmup_steps=-1 must be a number of at least 0"),
    ("--beta2=1", "beta2=1.0 must be less than 1"),
    ("--micro_batch_size=3", "batch_size=4 must be a multiple of 3, micro_batch_size x processes"),
    ("--micro_batch_size=8", "batch_size=4 must be a multiple of 8"),
    ("--dropout=1.5", "dropout=1.5 must lie in [0, 1)"),
    ("--n_head=3", "n_embd=16 must be a multiple of n_head=3, for example 18"),
    ("--attention=gqa --n_kv_head=5", "n_kv_head=5 must divide n_head=2"),
    ("--pos=rope --n_embd=18", "n_embd=18 gives heads of odd width 9"),
    ("--attention=qkv --n_kv_head=1", "--n_kv_head counts only with --attention=gqa"),
    ("--attention=mla --d_rope=8 --pos=agf", "--d_rope counts only with --pos=rope"),
    (
        "--attention=qv --wk=shared",
        "--wk counts only with --attention=qv_ka, as its `only` in model.py says, and this is qv",
    ),
    ("--block_size=100000", "block_size=100000 must be less than the 24324 training tokens"),
    ("--dataset=nowhere", "data set 'nowhere' is missing or damaged"),
    ("--dataset=openwebtext", "run: python prepare.py openwebtext"),
    ("--dataset=data/tiny", "'data/tiny' is no data set: it must be the plain name of a folder"),
    ("--dataset=/tmp/tiny", "'/tmp/tiny' is no data set: it must be the plain name of a folder"),
    (
        "--restartable --out=out/run --seed=2",
        "--seed=2 cannot change a run that has begun with 1337; leave it out",
    ),
    ("--out=out/run", "out/run holds a run already; go on with it by --resume, or choose another"),
]


@pytest.mark.parametrize("flags,words", TRAIN_FLAGS, ids=[flags for flags, _ in TRAIN_FLAGS])
def test_flags_of_train(folder, capsys, flags, words):
    misused(capsys, "train", [*NEW, *flags.split()], words)


RESUME_FLAGS = [
    ("--resume --out=out/nowhere", "there is no checkpoint out/nowhere/last.pt"),
    ("--resume --out=out", "there is no checkpoint out/last.pt"),
    ("--resume out/run", "argument --resume: out/run must be True or False"),
    ("--restartable", "--restartable needs --out, the folder in which to look for the run"),
]


@pytest.mark.parametrize("flags,words", RESUME_FLAGS, ids=[flags for flags, _ in RESUME_FLAGS])
def test_flags_of_a_run_that_goes_on(folder, capsys, flags, words):
    misused(capsys, "train", flags.split(), words)


PREPARE_FLAGS = [
    ("", "the following arguments are required: NAME"),
    ("nowhere.txt", "nowhere.txt cannot be read as UTF-8 text (No such file or directory"),
    ("data", "data cannot be read as UTF-8 text (Is a directory"),
    ("tiny.txt --tokens=5", "--tokens for openwebtext; leave it out for tiny.txt"),
    ("shakespeare_char --tokenizer=gpt2", "--tokenizer is for a text of your own"),
    ("openwebtext --tokens=-5", "--tokens=-5 must be at least 1"),
    ("openwebtext --tokens=inf", "inf must be a whole number"),
    ("openwebtext --tokens=many", "argument --tokens: "),
    ("tiny.txt --tokenizer=words", "invalid choice: 'words'"),
]


@pytest.mark.parametrize("flags,words", PREPARE_FLAGS, ids=[flags for flags, _ in PREPARE_FLAGS])
def test_flags_of_prepare(folder, capsys, flags, words):
    misused(capsys, "prepare", flags.split(), words)


SAMPLE_FLAGS = [
    ("--out=out/nowhere", "there is no checkpoint out/nowhere/last.pt"),
    ("--prompt=naïve", "character 'ï' (number 3 of the text) is not among the"),
    ("--prompt=", "the prompt is empty"),
    ("--prompt_file=nowhere.txt", "nowhere.txt cannot be read"),
    ("--temperature=-1", "--temperature=-1.0 must be at least 0"),
    ("--temperature=nan", "--temperature=nan must be at least 0"),
    ("--top_k=0", "--top_k=0 must be at least 1"),
    ("--max_new_tokens=0", "--max_new_tokens=0 must be at least 1"),
    ("--num_samples=0", "--num_samples=0 must be at least 1"),
    ("--kernel=triton", "--kernel=triton cannot be used here ("),
    ("--device=toaster", "--device=toaster cannot be used here ("),
    ("--attention_map=a.pdf", "--attention_map=a.pdf must end in .png"),
    ("--prompt=a --attention_map=map.png", "takes a prompt of 2 to 16 tokens"),
]


@pytest.mark.parametrize("flags,words", SAMPLE_FLAGS, ids=[flags for flags, _ in SAMPLE_FLAGS])
def test_flags_of_sample(folder, capsys, flags, words):
    misused(capsys, "sample", flags.split(), words)


def test_a_prompt_of_two_sources(folder, capsys):
    misused(capsys, "sample", ["--prompt=a", "--prompt_file=tiny.txt"], "--prompt")


# Folders and data ---------------------------------------------------------------------------------


def test_no_runs(folder, capsys):
    shutil.rmtree("out")
    misused(capsys, "train", ["--resume"], "there is no run in out/")
    misused(capsys, "sample", [], "there is no run in out/")


def test_a_file_where_a_runs_folder_should_be(folder, capsys):
    Path("taken").write_text("")
    words = "taken/run/config.json could not be written (Not a directory)"
    misused(capsys, "train", [*TINY, "--out=taken/run"], words)


def test_a_file_where_the_folder_of_runs_should_be(folder, capsys):
    shutil.rmtree("out")
    Path("out").write_text("")
    misused(capsys, "train", TINY, "could not be written (Not a directory)")


def test_a_run_in_use_by_another_process(folder, capsys):
    holder = subprocess.Popen(
        [sys.executable, PROGRAMS / "hold.py", "out/run"],
        env={**os.environ, "PYTHONPATH": str(PROGRAMS.parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"locked\n"
    try:
        for flags in [*TINY, "--out=out/run"], RESUME:
            words = "out/run is in use by another process; wait for that, or change --out"
            misused(capsys, "train", flags, words)
    finally:
        holder.communicate()


@pytest.mark.parametrize("text", [TEXT + "~", TEXT[::-1]], ids=["characters", "text"])
def test_a_run_that_goes_on_with_other_data(folder, capsys, text):
    Path("tiny.txt").write_text(text)
    assert call("prepare", "tiny.txt") is None
    words = "data set 'tiny' is not the one that out/run was trained on; prepare that again"
    misused(capsys, "train", RESUME, words)


META = Path("data/tiny/meta.json")


def token_files():
    return sorted(Path("data/tiny").glob("*.bin"))


def cut_tokens():
    for path in token_files():
        path.write_bytes(path.read_bytes()[:-4])


def remove_tokens():
    for path in token_files():
        path.unlink()


def cut_meta():
    META.write_text('{"tokenizer": ')


@pytest.mark.parametrize("damage", [cut_tokens, remove_tokens, cut_meta])
def test_damaged_data(folder, capsys, damage):
    damage()
    for flags in NEW, RESUME:
        misused(capsys, "train", flags, "data set 'tiny' is missing or damaged")


def test_a_text_that_is_no_longer_than_a_window(folder, capsys):
    Path("short.txt").write_text("abcdefghij" * 3)
    assert call("prepare", "short.txt") is None
    flags = [*NEW, "--dataset=short", "--block_size=32"]
    misused(capsys, "train", flags, "block_size=32 must be less than the 27 training tokens")


def test_another_text_of_the_same_name(folder, capsys):
    Path("other").mkdir()
    Path("other/tiny.txt").write_text(TEXT[::-1])
    misused(capsys, "prepare", ["other/tiny.txt"], "would be lost; rename the file, or add")


# Checkpoints --------------------------------------------------------------------------------------


def changed(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def other_config(path, **changes):
    config = torch.load(path, weights_only=True)["model_config"]
    changed(path, model_config={**config, **changes})


class Code:
    """What leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("code has run"),)


UNREADABLE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("hello"),
    "a list": lambda path: torch.save([1, 2], path),
    "code": lambda path: torch.save(Code(), path),
    "older": lambda path: changed(path, format=2),
}
OF_ANOTHER_MODEL = {
    "other sizes": lambda path: other_config(path, n_embd=32),
    "an unknown option": lambda path: other_config(path, mine=3),
    "an unknown attention": lambda path: other_config(path, attention="mine"),
}
READERS = pytest.mark.parametrize(
    "program,flags,name",
    [("train", RESUME, "last.pt"), ("sample", ["--out=out/run"], "best.pt")],
    ids=["train", "sample"],
)


@READERS
@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_checkpoint_that_cannot_be_read(folder, capsys, program, flags, name, damage):
    path = Path("out/run", name)
    UNREADABLE[damage](path)
    misused(capsys, program, flags, f"{path} cannot be read, or is no checkpoint of this code")


@READERS
@pytest.mark.parametrize("damage", OF_ANOTHER_MODEL)
def test_a_checkpoint_of_another_model(folder, capsys, program, flags, name, damage):
    path = Path("out/run", name)
    OF_ANOTHER_MODEL[damage](path)
    misused(capsys, program, flags, f"{path} was written by another version of model.py")
