"""README.md: its commands' flags exist, its links lead somewhere, and its Python works."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import call

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
                flags = [word.partition("=")[0] for word in words[words.index(programs[0]) :]]
                flags = [flag for flag in flags if flag.startswith("--")]
                found.append((Path(programs[0]).stem, flags))
    return found


def test_there_are_commands():
    assert {"train", "sample", "prepare", "compare"} <= {program for program, _ in commands()}


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
            assert set(flags) <= known


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
