"""prepare.py as its users run it. How they misuse it is in test_misuse.py."""

import contextlib
import hashlib
import http.server
import io
import itertools
import os
import shutil
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TEXT, call, contents, limited_file_size

import prepare


def test_a_prepared_text_comes_back(folder):
    meta, splits = prepare.read_dataset("tiny")
    tokenizer = prepare.tokenizer_from(meta["tokenizer"])
    assert b"".join(tokenizer.decode(splits[name]) for name in ("train", "val")).decode() == TEXT
    assert len(splits["train"]) == int(0.9 * len(TEXT)) == meta["tokens"]["train"]
    assert splits["train"].dtype == np.uint16 and meta["source"] == str(Path("tiny.txt").resolve())
    assert meta["sha256"] == {
        name: hashlib.sha256(ids.tobytes()).hexdigest() for name, ids in splits.items()
    }
    assert [path.name for path in Path("data").iterdir()] == ["tiny"], "no temporary folder is left"


def test_gpt2_tokens_come_back(folder, gpt2):
    Path("mixed.txt").write_text("Ein Hündchen, 一只小狗, a puppy. " * 20, encoding="utf-8")
    assert call("prepare", "mixed.txt", "--tokenizer=gpt2") is None
    meta, splits = prepare.read_dataset("mixed")
    text = b"".join(gpt2.decode(splits[name].tolist()) for name in ("train", "val")).decode()
    assert text == Path("mixed.txt").read_text(encoding="utf-8") and meta["tokenizer"] == {
        "kind": "gpt2"
    }
    assert gpt2.decode([50300]) == b"", "an id that only rounds the vocabulary up"


def test_a_mark_before_the_text_is_no_part_of_it(folder):
    Path("dogs.txt").write_bytes(("\ufeff" + "小狗\r\n" * 20).encode())
    assert call("prepare", "dogs.txt") is None
    assert prepare.read_dataset("dogs")[0]["tokenizer"]["chars"] == "\n\r小狗"


def test_pydoc_needs_no_network(folder):
    assert call("prepare", "pydoc") is None
    meta, splits = prepare.read_dataset("pydoc")
    assert len(splits["train"]) > 300_000 and meta["source"].startswith(
        "pydoc_data.topics of Python"
    )


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the test's folder, in the place of the site that has tiny Shakespeare."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(
            prepare, "SHAKESPEARE_URL", f"http://127.0.0.1:{httpd.server_address[1]}/tiny.txt"
        )
        yield
        httpd.shutdown()


def test_shakespeare_is_downloaded_and_checked(folder, server, monkeypatch):
    assert "is not tiny Shakespeare (its SHA-256 differs)" in call("prepare", "shakespeare_char")
    assert not Path("data/shakespeare_char").exists()
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    assert call("prepare", "shakespeare_char") is None
    assert {path.name for path in Path("data/shakespeare_char").iterdir()} == {
        "train.bin",
        "val.bin",
        "meta.json",
    }
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    shutil.copy("tiny.txt", "data/shakespeare_char/input.txt")
    assert call("prepare", "shakespeare_char") is None, "from input.txt, without the network"


def test_real_shakespeare(folder):
    source = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not source.exists():
        pytest.skip(f"the real tiny Shakespeare is not at ../shared/data/{source.name}")
    Path("data/shakespeare_char").mkdir()
    shutil.copy(source, "data/shakespeare_char/input.txt")
    assert call("prepare", "shakespeare_char") is None
    meta, splits = prepare.read_dataset("shakespeare_char")
    assert (len(splits["train"]), len(splits["val"]), len(meta["tokenizer"]["chars"])) == (
        1_003_854,
        111_540,
        65,
    )


def test_openwebtext_streams_from_parquet(folder, gpt2, monkeypatch):
    pytest.importorskip(
        "datasets", reason="openwebtext needs the package datasets, which is not installed"
    )
    import pyarrow
    import pyarrow.parquet

    texts = [f"Document number {i} says {'very ' * (i % 5)}little." for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "web.parquet")
    monkeypatch.setattr(prepare, "OPENWEBTEXT", dict(path="parquet", data_files="web.parquet"))
    assert call("prepare", "openwebtext") is None
    _, splits = prepare.read_dataset("openwebtext")
    documents = gpt2.decode(splits["val"].tolist()).decode().split("<|endoftext|>")
    assert documents == [texts[0], texts[2000], ""]
    assert gpt2.decode(splits["train"].tolist()).decode().count("<|endoftext|>") == 2498
    before = contents()
    prepare.OPENWEBTEXT["data_files"] = "bad.parquet"
    Path("bad.parquet").write_text("no parquet")
    assert "OpenWebText cannot be had" in call("prepare", "openwebtext")
    pyarrow.parquet.write_table(pyarrow.table({"text": [None] * 3}), "bad.parquet")
    assert "OpenWebText cannot be had" in call("prepare", "openwebtext")
    Path("bad.parquet").unlink()
    assert contents() == before, "the data set before is kept"


def test_openwebtext_in_bounded_memory(folder, gpt2, monkeypatch):
    """A source without an end: only what is asked for is read, and it ends on the token."""
    seen = itertools.count()
    endless = types.SimpleNamespace(
        iter=lambda size: (
            {"text": [f"Document {next(seen)}." for _ in range(size)]} for _ in itertools.count()
        )
    )
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda **options: endless)
    )
    assert call("prepare", "openwebtext", "--tokens=2e4") is None
    assert sum(prepare.read_dataset("openwebtext")[0]["tokens"].values()) == 20_000
    assert next(seen) < 20_000
    assert (
        "openwebtext is too short to be split"
        in call("prepare", "openwebtext", "--tokens=3").lower()
    )


def test_a_full_disk_leaves_no_half_made_data_set(folder):
    before = contents()
    Path("tiny.txt").write_text(TEXT * 2)
    sentence = limited_file_size(20_000, lambda: call("prepare", "tiny.txt"))
    assert "data/tiny could not be written (File too large) and is as before" in sentence
    assert "File too large" in limited_file_size(20_000, lambda: call("prepare", "pydoc"))
    Path("tiny.txt").write_text(TEXT)
    assert contents() == before and [path.name for path in Path("data").iterdir()] == ["tiny"]


@pytest.mark.parametrize("when", ["encode", "replace"])
def test_an_interrupted_prepare_is_no_data_set(folder, monkeypatch, when):
    """While the text is encoded, nothing has changed; while files are moved, there is none, rather than a mixed one."""

    def interrupted(*args):
        if when == "encode" or str(args[1]).endswith("val.bin"):
            raise KeyboardInterrupt
        return os.rename(*args)

    before = contents()
    where = prepare.CharTokenizer if when == "encode" else prepare.os
    monkeypatch.setattr(where, when, interrupted)
    Path("tiny.txt").write_text(TEXT[:-10] + "0123456789")
    assert call("prepare", "tiny.txt") == "interrupted"
    Path("tiny.txt").write_text(TEXT)
    if when == "encode":
        assert contents() == before
    else:
        assert "data set 'tiny' is missing or damaged" in call(
            "train", "--dataset=tiny", "--device=cpu"
        )


def test_a_bug_keeps_its_traceback(monkeypatch):
    """Only what the user can put right becomes a sentence: a fork's own OSError shows where it came from."""
    for error in OSError("mine"), ValueError("mine"), RuntimeError("mine"):

        def main():
            raise error

        with pytest.raises(type(error)):
            prepare.run_program(main)


def test_a_notebook_s_output_will_do():
    """It has print()'s methods, and no others."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        prepare.run_program(lambda: print("words"))
    assert output.getvalue() == "words\n"


def test_progress_says_how_far_and_how_long(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0, 31.0, 31.0, 31.0, 40.0, 62.0, 62.0, 62.0])
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: next(clock))
    progress = prepare.Progress(100, done=10)
    for done in 20, 30, 41, 50, 72:  # a line every half minute
        progress(done, f"{done} done")
    assert capsys.readouterr().err == "41 done, 0:00:59 left\n72 done, 0:00:28 left\n"
    assert prepare.format_time(3 * 3600 + 62) == "3:01:02"
