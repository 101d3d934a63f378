"""Turns text into tokens: data/<name>/train.bin and val.bin (uint16) and meta.json, which says how to read them.

    python prepare.py shakespeare_char               tiny Shakespeare, one token per character (1 MB, seconds)
    python prepare.py shakespeare                    the same text in GPT-2's byte-pair encoding
    python prepare.py pydoc                          Python's own language reference: needs no download at all
    python prepare.py openwebtext --tokens=1e9       as much of OpenWebText as you want, GPT-2's encoding
    python prepare.py PATH.txt --tokenizer=gpt2      any text of your own (or --tokenizer=char)

Everything is written under temporary names and renamed when it is complete, meta.json last: a data set that was
interrupted is none, and never passes for one.
"""

import argparse
import contextlib
import hashlib
import http.client
import itertools
import json
import logging
import os
import shlex
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

DATA = Path("data")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# The branch that the Hub itself converts to Parquet: it needs no data set script, which `datasets` no longer runs.
OPENWEBTEXT = dict(path="Skylion007/openwebtext", revision="refs/convert/parquet")
OPENWEBTEXT_TOKENS = 9.04e9


# ---------------------------------------------------------------------------------------------------------------------
# How all programs here talk to their user


class UserError(Exception):
    """Something that the user can put right: one sentence that says what is wrong, where, and what to do."""


def whole(text):
    """The int that a flag asks for; 1e9 is one, too."""
    for read in int, float:
        with contextlib.suppress(ValueError):
            if (number := read(text)) == number // 1 and abs(number) < 2**63:
                return int(number)
    raise argparse.ArgumentTypeError(f"{text} must be a whole number below 2**63, for example 1000 or 1e3")


class Parser(argparse.ArgumentParser):
    """Help that shows the program's own text; a mistake gets one sentence and exit status 2."""

    def __init__(self, description, **options):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)
        self.register("type", int, whole)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def named(flags):
    """Flags in a sentence."""
    return ", ".join(f"--{flag}" for flag in sorted(flags))


class Progress:
    """A line on standard error that says how far something is and how long it will still take: rewritten in place on a
    terminal, printed every half minute elsewhere."""

    def __init__(self, total, done=0):
        self.total, self.first, self.started, self.shown = total, done, time.perf_counter(), time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def rate(self, done):
        """Units a second since the beginning."""
        return (done - self.first) / (time.perf_counter() - self.started)

    def __call__(self, done, text):
        if time.perf_counter() - self.shown >= (0.2 if self.terminal else 30):
            self.shown = time.perf_counter()
            left = clock(max(0, self.total - done) / self.rate(done))
            print(f"\r{text}, {left} left\033[K" if self.terminal else f"{text}, {left} left", file=sys.stderr,
                  end="" if self.terminal else "\n", flush=True)

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def clock(seconds):
    """h:mm:ss"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def reason(error):
    """An exception's own words, in one line."""
    text = getattr(error, "strerror", None) or str(getattr(error, "reason", "")) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def run(main):
    """Runs a program. What the user can put right becomes one sentence on standard error and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:                                                          # `sample.py | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error.filename or 'a file'} cannot be used ({reason(error)}); see that it is there, "
                 "of the right kind, and that you may read and write it")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. `spec` is what meta.json and every checkpoint keep of one; `tokenizer_from` makes it again.


class CharTokenizer:
    """One token per distinct character, numbered in the order of their code points."""

    def __init__(self, chars):
        self.spec = {"kind": "char", "chars": chars}
        self.codes, self.vocab_size = self.code_points(chars), len(chars)

    @staticmethod
    def code_points(text):
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)

    def encode(self, text):
        """Token ids, uint16. Raises UserError naming a character that the vocabulary lacks."""
        codes = self.code_points(text)
        ids = np.searchsorted(self.codes, codes).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self.codes[ids] != codes)
        if len(unknown):
            at = int(unknown[0])
            raise UserError(f"character {text[at]!r} (number {at + 1} of the text) is not among the {self.vocab_size} that "
                            f"this model knows: {self.spec['chars']!r}; leave it out")
        return ids.astype(np.uint16)

    def decode(self, ids):
        """The text of these ids as UTF-8 bytes."""
        return "".join(self.spec["chars"][i] for i in ids).encode()


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken."""

    spec, vocab_size, end_of_text = {"kind": "gpt2"}, 50257, 50256

    def __init__(self):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError(f"GPT-2's vocabulary cannot be downloaded ({reason(error)}); connect to the network once, "
                            "or set TIKTOKEN_CACHE_DIR to a folder that has it") from None

    def encode(self, text):
        return np.array(self.bpe.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids):
        """UTF-8 bytes; one token may hold only a part of a character. The unused ids by which train.py rounds the
        vocabulary up stand for nothing."""
        return self.bpe.decode_bytes([i for i in ids if i < self.vocab_size])


def tokenizer_from(spec):
    """The tokenizer of a data set or checkpoint, from its `spec`."""
    return CharTokenizer(spec["chars"]) if spec["kind"] == "char" else GPT2Tokenizer()


# ---------------------------------------------------------------------------------------------------------------------
# A data set on disk


class Writer:
    """What `new_data` yields: takes token ids as they come, counts them, and is told the rest of meta.json."""

    def __init__(self, folder, files):
        self.folder, self.files, self.tokens, self.meta = folder, files, dict.fromkeys(files, 0), {}

    def write(self, split, ids):
        """Appends ids (anything like an array of integers below 65,536) to "train" or "val"."""
        self.files[split].write(np.asarray(ids, dtype=np.uint16))
        self.tokens[split] += len(ids)


@contextlib.contextmanager
def new_data(name):
    """Writes data/<name>/, all or nothing: with new_data(name) as writer: writer.write("train", ids); writer.meta = {...}"""
    folder = DATA / name
    names = ["train.bin", "val.bin", "meta.json"]
    temporary = {name: folder / f"{name}.{os.getpid()}.tmp" for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary["train.bin"], "wb") as train, open(temporary["val.bin"], "wb") as val:
            writer = Writer(folder, dict(train=train, val=val))
            yield writer
        temporary["meta.json"].write_text(json.dumps({**writer.meta, "tokens": writer.tokens}, indent=1) + "\n")
        (folder / "meta.json").unlink(missing_ok=True)                               # from here to the end, no data set
        for name in names:
            os.replace(temporary[name], folder / name)
    except OSError as error:
        raise UserError(f"{folder} could not be written ({reason(error)}); nothing half-made was left: make room, or fix the "
                        "permissions, and run the same command again") from None
    finally:
        with contextlib.suppress(OSError):
            for path in temporary.values():
                path.unlink(missing_ok=True)
            folder.rmdir()                                                           # succeeds only if nothing is in it


def load(name):
    """A prepared data set: its meta.json as a dict, and {"train": ids, "val": ids} as read-only uint16 arrays on disk.

    Raises UserError, with the command to run, where it is missing, incomplete or damaged."""
    if not name or name != Path(name).name:
        raise UserError(f"--dataset={name} must be the name of a folder in {DATA}/, without a path")
    known = name in (*SOURCES, "openwebtext")
    source = name if known else shlex.quote(f"PATH/{name.removesuffix('.txt')}.txt")
    folder, again = DATA / name, f"run: python prepare.py {source}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta["sha256"], meta["tokens"]["train"], meta["tokens"]["val"]               # a KeyError, if it has none
        vocab_size = tokenizer_size(meta["tokenizer"])
        splits = {}
        for split, tokens in meta["tokens"].items():
            path = folder / f"{split}.bin"
            if path.stat().st_size != 2 * tokens:
                raise UserError(f"{path} has {path.stat().st_size} bytes, not the {2 * tokens} of its {tokens} tokens; {again}")
            splits[split] = np.memmap(path, dtype=np.uint16, mode="r")
            largest = int(splits[split][:10_000_000].max())
            if largest >= vocab_size:
                raise UserError(f"{path} is damaged: token {largest} is outside its vocabulary of {vocab_size}; {again}")
        return meta, splits
    except FileNotFoundError as error:
        others = ", ".join(sorted(path.parent.name for path in DATA.glob("*/meta.json"))) or "none"
        raise UserError(f"data set {name!r} is not prepared ({error.filename} is missing; prepared are: {others}); {again}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({reason(error)}); {again}") from None


def tokenizer_size(spec):
    """The vocabulary of a tokenizer, without loading it."""
    return len(spec["chars"]) if spec["kind"] == "char" else GPT2Tokenizer.vocab_size


# ---------------------------------------------------------------------------------------------------------------------
# Where text comes from


def shakespeare_text():
    """Tiny Shakespeare, from data/shakespeare_char/input.txt if it lies there, else downloaded to there."""
    path = DATA / "shakespeare_char" / "input.txt"
    if path.exists():
        raw = path.read_bytes()
        advice = f"delete {path} to have it downloaded, or give a text of your own another path"
    else:
        try:
            raw = urllib.request.urlopen(SHAKESPEARE_URL, timeout=10).read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"tiny Shakespeare cannot be downloaded ({reason(error)}); save {SHAKESPEARE_URL} as {path} "
                            "and run the command again, or take --dataset=pydoc, which needs no network") from None
        advice = "the download was damaged or changed; try again"
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise UserError(f"{'the file at ' + str(path) if path.exists() else 'what was downloaded'} is not tiny Shakespeare: "
                        f"its SHA-256 is {digest[:12]}..., not {SHAKESPEARE_SHA256[:12]}...; {advice}")
    if not path.exists():
        with contextlib.suppress(OSError):                                           # next time it need not be downloaded
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(raw)
            os.replace(temporary, path)
    return raw, SHAKESPEARE_URL


def pydoc_text():
    """The language reference that every Python carries for its help()."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics)).encode(), f"pydoc_data.topics of Python {sys.version.split()[0]}"


def file_text(path):
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); give the path of a text file, or one of "
                        f"{', '.join(SOURCES)}, openwebtext") from None


SOURCES = {"shakespeare_char": (shakespeare_text, "char"), "shakespeare": (shakespeare_text, "gpt2"),
           "pydoc": (pydoc_text, "char")}


def prepare_text(name, read, tokenizer):
    """Writes data/<name>/: the first 90 % of a text for training, the last 10 % for validation (nanoGPT's split)."""
    raw, source = read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text (byte {error.start} is {raw[error.start]:#04x}); convert it first, "
                        "for example with iconv") from None
    if len(text) < 20:
        raise UserError(f"{source} holds {len(text)} characters, too few to split; give a text of 20 or more (train.py will "
                        "want some thousands)")
    if tokenizer == "char":
        tokenizer = CharTokenizer("".join(sorted(set(text))))
        if tokenizer.vocab_size > 2**16:
            raise UserError(f"{source} has {tokenizer.vocab_size} different characters, more than uint16 can number; "
                            "take --tokenizer=gpt2")
    else:
        tokenizer = GPT2Tokenizer()
    cut = int(0.9 * len(text))
    with new_data(name) as writer:
        for split, part in ("train", text[:cut]), ("val", text[cut:]):
            writer.write(split, tokenizer.encode(part))
        writer.meta = dict(tokenizer=tokenizer.spec, source=source, sha256=hashlib.sha256(raw).hexdigest())
    return writer


def documents(source=None):
    """Yields the texts of OpenWebText one by one, from the Hub or from a local Parquet or text file."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("openwebtext needs one more package; run: pip install datasets") from None
    logging.disable(logging.WARNING)                                                 # it tells of every attempt to connect
    if source is None:
        options = OPENWEBTEXT
    elif source.endswith(".parquet"):
        options = dict(path="parquet", data_files=source)
    else:
        options = dict(path="text", data_files=source, sample_by="paragraph")
    print(f"opening {source or options['path']} ...", file=sys.stderr, flush=True)
    try:
        for document in load_dataset(**options, split="train", streaming=True):
            if not isinstance(document["text"], str):
                raise ValueError(f"text is {document['text']}")
            yield document["text"]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        advice = "give the path of" if source else "it takes the network, or --source with"
        raise UserError(f"{source or options['path']} cannot be read ({reason(error)}); {advice} a text file, or a .parquet file "
                        "that has a column 'text'") from None


def prepare_openwebtext(limit=None, source=None):
    """Streams documents through GPT-2's encoding into data/openwebtext/, every 2,000th into validation.

    Stops after `limit` tokens. However much is read, memory holds 512 documents; as many threads as cores encode them."""
    tokenizer, digest, texts = GPT2Tokenizer(), hashlib.sha256(), documents(source)
    target = limit or OPENWEBTEXT_TOKENS
    progress, count, done, most = Progress(target), 0, 0, limit or sys.maxsize
    with new_data("openwebtext") as writer:
        while done < most and (batch := list(itertools.islice(texts, 512))):
            for text, ids in zip(batch, tokenizer.bpe.encode_ordinary_batch(batch, num_threads=os.cpu_count())):
                if done < most:
                    ids = (ids + [tokenizer.end_of_text])[: most - done]
                    writer.write("train" if count % 2000 else "val", ids)
                    digest.update(text.encode())
                    count, done = count + 1, done + len(ids)
            progress(done, f"{done / 1e6:,.1f}M of {target / 1e6:,.0f}M tokens, {progress.rate(done) / 1e6:.2f}M a second")
        progress.clear()
        if count < 2:
            raise UserError(f"{source or 'the source'} gave fewer than 2 documents, and validation takes one; "
                            + (f"raise --tokens={limit}" if done == limit else "give more"))
        writer.meta = dict(tokenizer=tokenizer.spec, source=source or OPENWEBTEXT["path"], documents=count, sha256=digest.hexdigest())
    return writer


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="NAME", help=f"{', '.join(SOURCES)}, openwebtext, or the path of a UTF-8 text file")
    parser.add_argument("--tokenizer", choices=("char", "gpt2"), help="for a text of your own (default: char)")
    parser.add_argument("--tokens", type=int, help="openwebtext: stop after so many (default: all, 9 billion, 18 GB)")
    parser.add_argument("--source", dest="file", metavar="FILE", help="openwebtext: read a .parquet file (column 'text') or a text "
                        "file (documents between empty lines) instead of the Hub")
    args = parser.parse_args(argv)
    if args.tokens is not None and args.tokens < 1:
        parser.error(f"--tokens={args.tokens} must be at least 1, for example 1e9")
    path, named = Path(args.source), args.source in (*SOURCES, "openwebtext")
    if args.tokenizer and named:
        parser.error(f"--tokenizer={args.tokenizer} is for a text of your own, and {args.source} has its tokenizer; leave it out"
                     + (", or take the name shakespeare, by GPT-2's encoding" if args.source == "shakespeare_char" else ""))
    for flag, value in ("tokens", args.tokens), ("source", args.file):
        if value and args.source != "openwebtext":
            parser.error(f"--{flag}={value} is for openwebtext, and this is {args.source}; leave it out")
    if args.source == "openwebtext":
        writer = prepare_openwebtext(args.tokens, args.file)
    elif named:
        writer = prepare_text(args.source, *SOURCES[args.source])
    elif path.stem in (*SOURCES, "openwebtext"):
        raise UserError(f"{path} would overwrite the data set {path.stem!r}, whose name is taken; rename the file")
    else:
        writer = prepare_text(path.stem, lambda: file_text(path), args.tokenizer or "char")
    print(f"{writer.folder}: {writer.tokens['train']:,} training and {writer.tokens['val']:,} validation tokens, vocabulary of "
          f"{tokenizer_size(writer.meta['tokenizer']):,}\nto train on it: python train.py --dataset={shlex.quote(writer.folder.name)}")


if __name__ == "__main__":
    run(main)
