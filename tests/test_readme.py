"""README.md: its commands' flags and their values exist, its links lead somewhere, and its Python
works."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import call

import train
from model import ATTENTIONS, QV

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """(program, its flags) of each command of the README, in its text, too."""
    found = []
    for line in [*"".join(blocks("sh")).splitlines(), *re.findall(r"`([^`\n]+)`", README)]:
        for command in line.partition("#")[0].split("&&"):
            words = shlex.split(command.partition("|")[2] or command)
            programs = [word for word in words if word.endswith(".py")]
            if programs and words[0] in ("python", "torchrun"):
                after = words[words.index(programs[0]) + 1 :]
                flags = [word for word in after if word.startswith("--")]
                found.append((Path(programs[0]).stem, flags))
    return found


def flags_in_the_text():
    """Those of train.py, which stand alone or side by side."""
    text = README.replace("torchrun's `--nnodes`", "")
    return [flag for flags in re.findall(r"`(--[^`]+)`", text) for flag in flags.split()]


def names(flags):
    return {flag.partition("=")[0] for flag in flags}


def test_there_are_commands():
    assert {"train", "sample", "prepare", "compare"} <= {program for program, _ in commands()}


def test_every_program_exists():
    for path in re.findall(r"python ([\w/]+\.py)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("program", sorted({program for program, _ in commands()}))
def test_every_flag_exists(program, capsys):
    if program == "kernel":
        pytest.skip("kernel.py hands its flags to tests/experiments/benchmark.py")
    call(program, "--help")
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    if program == "compare":  # it hands others to train.py
        call("train", "--help")
        known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    for other, flags in commands():
        if other == program:
            assert names(flags) <= known


def test_every_flag_in_the_text_exists(capsys):
    call("train", "--help")
    assert names(flags_in_the_text()) <= set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize("program", ["train", "sample", "compare", "decoding"])
def test_programs_take_the_values_of_their_flags(program, monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "keyless", QV)  # as the README has one made
    for other, flags in commands():
        if other == program:
            importlib.import_module(program).parse(flags)


def test_train_takes_the_values_of_flags_in_the_text():
    for flag in flags_in_the_text():
        value = flag.partition("=")[2]
        if value and not value.isupper():  # G or FOLDER stand for any
            train.parse([flag])


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    files = [link for link in links if not link.startswith("https://")]
    assert "model.py" in files
    for file in files:
        assert (ROOT / file).exists(), file


def test_the_python_that_samples_writes_text(folder, capsys):
    (code,) = [block for block in blocks("python") if "GPT.load" in block]
    path = re.search(r'GPT\.load\("(.*?)"\)', code)[1]
    exec(code.replace(path, "out/run/best.pt").replace("ROMEO:", "10 green"), {})
    assert len(capsys.readouterr().out.strip()) > 50
