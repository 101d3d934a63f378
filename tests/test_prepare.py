"""prepare.py: tokenizers, data sets, and how all programs talk to their user."""

import argparse
import contextlib
import hashlib
import http.server
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, call, contents, limited_file_size

import prepare
from model import GPT, GPTConfig
from prepare import CharTokenizer, UserError, read_dataset, tokenizer_from, tokenizer_size

OTHER_TEXT = TEXT[::-1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(here):
    """In it, tiny.txt has been prepared."""
    Path("tiny.txt").write_text(TEXT)
    assert call("prepare", "tiny.txt") is None
    return here


def text_of(name):
    """What a prepared data set says."""
    meta, splits = read_dataset(name)
    tokenizer = tokenizer_from(meta["tokenizer"])
    return tokenizer.decode(splits["train"]) + tokenizer.decode(splits["val"])


# Tokenizers ---------------------------------------------------------------------------------------

CHARS = "".join(sorted(set(TEXT)))
PROMPT = "7 green bottles"


@pytest.fixture(params=["char", "gpt2"])
def tokenizer(request):
    return CharTokenizer(CHARS) if request.param == "char" else request.getfixturevalue("gpt2")


def test_what_is_encoded_is_decoded(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_list_an_array_and_a_tensor_are_decoded(tokenizer):
    ids = tokenizer.encode(PROMPT)
    assert tokenizer.decode(ids) == PROMPT
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == PROMPT
    assert tokenizer.decode(torch.tensor(ids)) == PROMPT


def test_a_model_takes_what_encode_gives(tokenizer):
    """As somebody writes it who has used no more than torch."""
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8))
    idx = torch.tensor(tokenizer.encode(PROMPT))[None]
    tokens = torch.cat(list(model.generate(idx, 5)), dim=1)
    assert idx.dtype == torch.int64
    assert isinstance(tokenizer.decode(tokens[0]), str)


def test_a_tokenizer_is_made_again_from_its_specification(tokenizer):
    spec = json.loads(json.dumps(tokenizer.spec))
    assert tokenizer_from(spec).encode(PROMPT) == tokenizer.encode(PROMPT)
    assert tokenizer_size(spec) == tokenizer.vocab_size


def test_ids_that_round_the_vocabulary_up_stand_for_nothing(tokenizer):
    ids = tokenizer.encode(PROMPT)
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 46]) == PROMPT


def test_a_part_of_a_character_is_decoded_to_a_mark(gpt2):
    ids = gpt2.encode("小狗")
    assert gpt2.decode(ids) == "小狗"
    assert gpt2.decode(ids[:-1]).startswith("小")
    assert gpt2.decode(ids[:-1]).endswith("\N{REPLACEMENT CHARACTER}")


def test_an_unknown_character_is_named_and_the_vocabulary_is_not():
    chinese = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 5000))))
    with pytest.raises(UserError) as caught:
        chinese.encode("一丁x一")
    assert "character 'x' (number 3 of the text) is not among the 5000" in str(caught.value)
    assert "一" not in str(caught.value)


# A text becomes a data set ------------------------------------------------------------------------


def test_a_prepared_text_comes_back(tiny):
    assert text_of("tiny") == TEXT


def test_a_prepared_text_comes_back_in_gpt2_s_encoding(here, gpt2):
    text = "Ein Hündchen, 一只小狗, a puppy. " * 20
    Path("mixed.txt").write_text(text, encoding="utf-8")
    assert call("prepare", "mixed.txt", "--tokenizer=gpt2") is None
    assert text_of("mixed") == text
    assert read_dataset("mixed")[0]["tokenizer"] == {"kind": "gpt2"}


def test_characters_are_numbered_in_unicodes_order(tiny):
    assert read_dataset("tiny")[0]["tokenizer"] == {"kind": "char", "chars": CHARS}


def test_the_last_tenth_is_for_validation(tiny):
    meta, splits = read_dataset("tiny")
    assert len(splits["train"]) == int(0.9 * len(TEXT))
    assert meta["tokens"] == {name: len(ids) for name, ids in splits.items()}


def test_tokens_are_of_16_bits_and_read_only(tiny):
    for ids in read_dataset("tiny")[1].values():
        assert ids.dtype == np.uint16
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1


def test_meta_json_names_the_source_the_files_and_their_digests(tiny):
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    assert meta["source"] == str(Path("tiny.txt").resolve())
    files = {name: Path("data/tiny", meta["files"][name]).read_bytes() for name in ("train", "val")}
    assert meta["sha256"] == {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}


def test_a_mark_before_the_text_is_no_part_of_it(here):
    Path("dogs.txt").write_bytes(("\ufeff" + "小狗\r\n" * 20).encode())
    assert call("prepare", "dogs.txt") is None
    assert text_of("dogs") == "小狗\r\n" * 20


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused(here, encoding):
    Path("wide.txt").write_bytes(TEXT.encode(encoding))
    assert "wide.txt has NUL characters in it, as UTF-16 text has" in call("prepare", "wide.txt")
    assert not Path("data").exists()


def test_utf_16_with_a_mark_is_refused(here):
    Path("wide.txt").write_bytes(TEXT.encode("utf-16"))
    assert "wide.txt cannot be read as UTF-8 text" in call("prepare", "wide.txt")


def test_more_distinct_characters_than_tokens_can_tell_apart_are_refused(here):
    Path("signs.txt").write_text("".join(map(chr, range(0x10000, 0x20001))), encoding="utf-8")
    assert "signs.txt has 65,537 distinct characters" in call("prepare", "signs.txt")
    assert not Path("data").exists()


def test_as_many_distinct_characters_as_tokens_can_tell_apart(here):
    signs = "".join(map(chr, range(0x10000, 0x20000)))
    Path("signs.txt").write_text(signs, encoding="utf-8")
    assert call("prepare", "signs.txt") is None
    assert text_of("signs") == signs


def test_a_text_of_one_split_is_refused(here):
    Path("short.txt").write_text("abcdefghij")
    assert "too short to be split (tokens: {'train': 9, 'val': 1})" in call("prepare", "short.txt")
    assert not Path("data").exists()


def test_standard_input_is_a_text(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert call("prepare", "-") is None
    assert text_of("-") == TEXT


def test_a_missing_data_set_names_its_command(tiny):
    for name, command in ("novel", "PATH/novel.txt"), ("openwebtext", "openwebtext"):
        with pytest.raises(UserError) as caught:
            read_dataset(name)
        assert str(caught.value).endswith(f"prepared are: tiny); run: python prepare.py {command}")


@pytest.mark.parametrize("name", ["data/tiny", "../tiny", "tiny/", "/data/tiny"])
def test_a_path_is_no_name_of_a_data_set(tiny, name):
    name = name.replace("/data", f"{tiny}/data")
    with pytest.raises(UserError, match="must be the plain name of a folder in data/, for example"):
        read_dataset(name)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", ["shorter", "empty", "gone"])
def test_a_file_that_lacks_tokens_is_found(tiny, split, damage):
    path = Path("data/tiny", read_dataset("tiny")[0]["files"][split])
    raw = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(raw[:-1] if damage == "shorter" else b"")
    with pytest.raises(UserError, match="data set 'tiny' is missing or damaged"):
        read_dataset("tiny")


# Texts that are known by name ---------------------------------------------------------------------


def test_pydoc_needs_no_network(here):
    assert call("prepare", "pydoc") is None
    meta, splits = read_dataset("pydoc")
    assert len(splits["train"]) > 300_000
    assert meta["source"].startswith("pydoc_data.topics of Python")


@pytest.fixture
def server(tiny, monkeypatch):
    """Serves tiny.txt in the place of tiny Shakespeare."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tiny))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_address[1]}/tiny.txt"
        monkeypatch.setattr(prepare, "SHAKESPEARE_URL", url)
        yield
        httpd.shutdown()


@pytest.fixture
def right_digest(monkeypatch):
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())


def test_shakespeare_is_downloaded(server, right_digest):
    assert call("prepare", "shakespeare_char") is None
    assert text_of("shakespeare_char") == TEXT


def test_a_download_of_something_else_is_refused(server):
    assert "is not tiny Shakespeare (its SHA-256 differs)" in call("prepare", "shakespeare_char")
    assert not Path("data/shakespeare_char").exists()


def test_shakespeare_is_read_from_a_file_without_the_network(here, right_digest, monkeypatch):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    Path("data/shakespeare_char").mkdir(parents=True)
    Path("data/shakespeare_char/input.txt").write_text(TEXT)
    assert call("prepare", "shakespeare_char") is None
    assert text_of("shakespeare_char") == TEXT


def test_without_a_network_the_default_is_pydoc(here, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    assert prepare.load_or_prepare(None)[0] == "pydoc"
    assert capsys.readouterr().out.startswith("training on pydoc, Python's language reference")


def test_the_real_shakespeare(here):
    source = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    if not source.exists():
        pytest.skip(f"the real tiny Shakespeare is not at ../shared/data/{source.name}")
    Path("data/shakespeare_char").mkdir(parents=True)
    shutil.copy(source, "data/shakespeare_char/input.txt")
    name, meta, splits = prepare.load_or_prepare(None)
    assert name == "shakespeare_char"
    assert meta["tokens"] == {"train": 1_003_854, "val": 111_540}
    assert tokenizer_size(meta["tokenizer"]) == 65


# A data set is replaced as a whole, or not at all -------------------------------------------------


def test_a_text_that_has_changed_replaces_its_data_set(tiny):
    Path("tiny.txt").write_text(OTHER_TEXT)
    assert call("prepare", "tiny.txt") is None
    assert text_of("tiny") == OTHER_TEXT
    assert len(list(Path("data/tiny").iterdir())) == 3, "the old files are gone"


def test_another_text_replaces_it_only_if_told_to(tiny):
    Path("other").mkdir()
    Path("other/tiny.txt").write_text(OTHER_TEXT)
    assert call("prepare", "other/tiny.txt") == 2
    assert text_of("tiny") == TEXT
    assert call("prepare", "other/tiny.txt", "--overwrite") is None
    assert text_of("tiny") == OTHER_TEXT


def test_standard_input_replaces_standard_input_only_if_told_to(here, monkeypatch):
    for text, flags, expected in (
        (TEXT, [], None),
        (OTHER_TEXT, [], 2),
        ("ab" * 50, ["--overwrite"], None),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert call("prepare", "-", *flags) == expected
    assert text_of("-") == "ab" * 50


WRITES = ["training tokens", "validation tokens", "meta.json"]


@pytest.mark.parametrize("failing", WRITES)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_overwrite_leaves_the_old_data_set(tiny, monkeypatch, failing, error):
    Path("tiny.txt").write_text(OTHER_TEXT)
    before = contents()
    renamed = itertools.count()

    def replace(*args):
        if next(renamed) == WRITES.index(failing):
            raise error
        return os.rename(*args)

    monkeypatch.setattr(prepare.os, "replace", replace)
    assert call("prepare", "tiny.txt") is not None
    assert contents() == before


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
import prepare

renamed = []

def replace(*args):
    renamed.append(args)
    if len(renamed) > {count}:
        os._exit(9)
    os.rename(*args)

os.replace = replace
prepare.main(["tiny.txt"])
"""


@pytest.mark.parametrize("failing", WRITES)
def test_a_killed_overwrite_leaves_the_old_data_set_and_the_next_one_cleans_up(tiny, failing):
    Path("tiny.txt").write_text(OTHER_TEXT)
    code = KILLED.format(root=str(ROOT), count=WRITES.index(failing))
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert text_of("tiny") == TEXT
    assert len(list(Path("data/tiny").iterdir())) > 3, "what was half-written"
    assert call("prepare", "tiny.txt") is None
    assert text_of("tiny") == OTHER_TEXT
    assert len(list(Path("data/tiny").iterdir())) == 3


def test_a_full_disk_leaves_the_old_data_set(tiny):
    Path("tiny.txt").write_text(TEXT * 2)
    before = contents()
    sentence = limited_file_size(20_000, lambda: call("prepare", "tiny.txt"))
    assert "could not be written (File too large); what was there is unchanged" in sentence
    assert contents() == before


def test_who_reads_the_old_data_set_can_go_on(tiny):
    """As a training does while its data set is prepared anew."""
    ids = read_dataset("tiny")[1]["train"]
    before = ids.tolist()
    Path("tiny.txt").write_text(OTHER_TEXT)
    assert call("prepare", "tiny.txt") is None
    assert ids.tolist() == before


def test_what_is_not_ours_stays(tiny):
    for name in "input.txt", "notes.bin", "mine.tmp":
        Path("data/tiny", name).write_text("mine")
    assert call("prepare", "tiny.txt") is None
    assert len(list(Path("data/tiny").iterdir())) == 6


def test_of_two_processes_that_prepare_at_once_both_have_the_data_set(here, monkeypatch):
    """While this one is about to rename its first file, another one writes all, and cleans up."""
    replace = os.replace

    def after_another(*args):
        monkeypatch.setattr(prepare.os, "replace", replace)
        monkeypatch.setattr(prepare.os, "getpid", lambda: 1)
        prepare.load_or_prepare("pydoc")
        return replace(*args)

    monkeypatch.setattr(prepare.os, "replace", after_another)
    name, meta, splits = prepare.load_or_prepare("pydoc")
    assert splits["train"].tolist() == read_dataset("pydoc")[1]["train"].tolist()


# OpenWebText --------------------------------------------------------------------------------------


class Stream:
    """What load_dataset(..., streaming=True) gives: documents, until the stream breaks."""

    def __init__(self, documents, broken_after=None, error=None):
        self.documents, self.broken_after, self.error = documents, broken_after, error
        self.read = 0

    def skip(self, count):
        return Stream(self.documents[count:], self.broken_after, self.error)

    def iter(self, size):
        for start in range(0, len(self.documents), size):
            if self.broken_after is not None and start >= self.broken_after:
                raise self.error
            yield {"text": self.documents[start : start + size]}


@pytest.fixture
def web(here, gpt2, monkeypatch):
    """Puts a stream in the place of the package `datasets`, installed or not."""

    def serve(stream):
        package = types.SimpleNamespace(load_dataset=lambda **options: stream)
        monkeypatch.setitem(sys.modules, "datasets", package)

    serve(Stream(DOCUMENTS))
    return serve


DOCUMENTS = [f"Document {number} says {'very ' * (number % 5)}little." for number in range(2600)]
ALL = sys.maxsize


def test_between_documents_there_is_a_mark(web, gpt2):
    prepare.prepare_openwebtext(ALL)
    _, splits = read_dataset("openwebtext")
    documents = gpt2.decode(splits["train"]).split("<|endoftext|>")
    assert documents == [*DOCUMENTS[1:2000], *DOCUMENTS[2001:], ""]


def test_every_2000th_document_is_for_validation(web, gpt2):
    prepare.prepare_openwebtext(ALL)
    _, splits = read_dataset("openwebtext")
    assert gpt2.decode(splits["val"]).split("<|endoftext|>") == [DOCUMENTS[0], DOCUMENTS[2000], ""]


def test_no_more_is_read_than_is_asked_for(web):
    """The source is long. What is read ends with a batch of documents."""
    batches = iter(range(100))

    class Long(Stream):
        def skip(self, count):
            return self

        def iter(self, size):
            for _ in batches:
                yield {"text": ["A document of seven tokens ends"] * size}

    web(Long([]))
    prepare.prepare_openwebtext(20_000)
    tokens = sum(read_dataset("openwebtext")[0]["tokens"].values())
    assert 20_000 <= tokens < 20_000 + 512 * 7
    assert next(batches) == tokens / (512 * 7)


class ReadTimeout(Exception):
    """Like httpx's, no OSError."""


@pytest.mark.parametrize("error", [ReadTimeout(), ConnectionError("gone"), KeyError("text")])
def test_a_broken_stream_is_a_sentence_and_what_was_read_is_kept(web, error):
    web(Stream(DOCUMENTS, broken_after=1024, error=error))
    sentence = call("prepare", "openwebtext")
    assert "the stream of OpenWebText broke (" in sentence
    assert "what was read is kept" in sentence
    assert read_dataset("openwebtext")[0]["documents"] == 1024


def test_a_stream_that_never_begins_is_a_sentence(web):
    web(Stream(DOCUMENTS, broken_after=0, error=ReadTimeout()))
    assert "(ReadTimeout)" in call("prepare", "openwebtext")
    assert not Path("data").exists()


@pytest.mark.parametrize("error", [ReadTimeout(), KeyboardInterrupt(), None])
def test_the_same_command_goes_on(web, error):
    """Where the stream broke, or somebody stopped it, or fewer tokens were asked for."""
    prepare.prepare_openwebtext(ALL)
    unbroken = contents()
    shutil.rmtree("data")
    web(Stream(DOCUMENTS, broken_after=1024 if error else None, error=error))
    call("prepare", "openwebtext") if error else prepare.prepare_openwebtext(10_000)
    assert 0 < read_dataset("openwebtext")[0]["documents"] < 2600
    web(Stream(DOCUMENTS))
    assert call("prepare", "openwebtext") is None
    assert contents() == unbroken


def test_what_was_half_written_when_the_process_died_does_not_count(web):
    prepare.prepare_openwebtext(ALL)
    unbroken = text_of("openwebtext")
    shutil.rmtree("data")
    prepare.prepare_openwebtext(10_000)
    for path in Path("data/openwebtext").glob("*.bin"):
        with open(path, "ab") as file:
            file.write(b"half of what came next")
    prepare.prepare_openwebtext(ALL)
    assert text_of("openwebtext") == unbroken


def test_enough_tokens_are_enough(web):
    prepare.prepare_openwebtext(20_000)
    before = contents()
    web(Stream(DOCUMENTS, broken_after=0, error=AssertionError("nobody should read this")))
    prepare.prepare_openwebtext(20_000)
    assert contents() == before


def test_a_full_disk_leaves_what_was_read_before(web):
    prepare.prepare_openwebtext(10_000)
    before = [ids.tolist() for ids in read_dataset("openwebtext")[1].values()]
    sentence = limited_file_size(25_000, lambda: call("prepare", "openwebtext"))
    assert "could not be written (File too large); what was there is unchanged" in sentence
    assert [ids.tolist() for ids in read_dataset("openwebtext")[1].values()] == before


def test_without_the_package_datasets_there_is_a_sentence(here, gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in call("prepare", "openwebtext")


def test_too_few_tokens_are_refused(here, capsys):
    assert call("prepare", "openwebtext", "--tokens=10") == 2
    assert "--tokens=10 must be at least 1e6, for example 1e9" in capsys.readouterr().err


def test_the_package_datasets_streams_from_parquet(here, gpt2, monkeypatch):
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), "web.parquet")
    monkeypatch.setattr(prepare, "OPENWEBTEXT", dict(path="parquet", data_files="web.parquet"))
    prepare.prepare_openwebtext(10_000)
    prepare.prepare_openwebtext(ALL)
    _, splits = read_dataset("openwebtext")
    documents = gpt2.decode(splits["train"]).split("<|endoftext|>")
    assert documents == [*DOCUMENTS[1:2000], *DOCUMENTS[2001:], ""]


# How programs talk to their user ------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("mine"), ValueError("mine"), RuntimeError("mine")])
def test_a_bug_keeps_its_traceback(error):
    """Only what the user can put right becomes a sentence."""

    def main():
        raise error

    with pytest.raises(type(error)):
        prepare.run_program(main)


def test_a_notebook_s_output_will_do():
    """It has print()'s methods, and no others."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        prepare.run_program(lambda: print("words"))
    assert output.getvalue() == "words\n"


def run_into(output, *command):
    """Runs `python <command>` with this standard output; returns its exit status and its errors."""
    result = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:]],
        stdout=output,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    return result.returncode, result.stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_the_output_is_a_sentence(tiny):
    with open("/dev/full", "w") as full:
        assert run_into(full, "prepare.py", "tiny.txt") == (
            1,
            "prepare.py: the output cannot be written (the disk is full); make room for it\n",
        )


def test_a_reader_of_the_output_may_leave(tiny):
    reader, writer = os.pipe()
    os.close(reader)
    assert run_into(writer, "prepare.py", "tiny.txt") == (1, "")
    os.close(writer)


@pytest.mark.parametrize("text, number", [("12", 12), ("1e9", 10**9), ("-3", -3), ("2.0", 2)])
def test_whole_numbers(text, number):
    assert prepare.parse_int(text) == number
    assert isinstance(prepare.parse_int(text), int)


@pytest.mark.parametrize("text", ["two", "2.5", "1e30", "inf", "nan", ""])
def test_no_whole_numbers(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number below 2"):
        prepare.parse_int(text)


def test_what_fails_while_a_file_is_written_leaves_the_file(here):
    path = Path("words.txt")
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="words.txt could not be written .No space left"):
        prepare.write_atomically(path, fail)
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("words.txt", "old")]


def test_the_newest_run_is_the_one_with_the_youngest_checkpoint(here):
    for name, time in ("one", 3), ("two", 5), ("three", 4), ("compare/four", 9):
        path = Path("out", name, "last.pt")
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    assert prepare.newest_run() == Path("out/two")


def test_progress_says_how_far_and_how_long(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0, 31.0, 31.0, 31.0, 40.0, 62.0, 62.0, 62.0])
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: next(clock))
    progress = prepare.Progress(100, done=10)
    for done in 20, 30, 41, 50, 72:  # a line every half minute
        progress(done, f"{done} done")
    assert capsys.readouterr().err == "41 done, 0:00:59 left\n72 done, 0:00:28 left\n"


def test_times_are_hours_minutes_and_seconds():
    assert prepare.format_time(3 * 3600 + 62) == "3:01:02"
