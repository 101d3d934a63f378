"""Turns text into tokens: data/<name>/train.bin and val.bin (uint16) and meta.json, which says how to read them.

python prepare.py shakespeare_char               tiny Shakespeare, one token per character (1 MB, seconds)
python prepare.py shakespeare                    the same text in GPT-2's byte-pair encoding
python prepare.py pydoc                          Python's own language reference: needs no download at all
python prepare.py openwebtext --tokens=1e9       as much of OpenWebText as you want, GPT-2's encoding
python prepare.py PATH.txt --tokenizer=gpt2      any text of your own (or --tokenizer=char)
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import shlex
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

DATA, OUT = Path("data"), Path("out")  # the data sets, and the runs that train.py makes
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# The branch that the Hub itself converts to Parquet: it needs no data set script, which `datasets` no longer runs.
OPENWEBTEXT = dict(path="Skylion007/openwebtext", revision="refs/convert/parquet")


# --- How all programs here talk to their user and write files --------------------------------------------------------


class UserError(ValueError):
    """Something that the user can put right: one sentence that says what is wrong, where, and what to do."""


class DownloadError(UserError):
    """The network did not give what was asked for."""


def describe_error(error):
    """An exception's own words, in one line."""
    return " ".join(
        (getattr(error, "strerror", None) or str(error) or type(error).__name__).split()
    )[:200]


def run_program(main):
    """Runs a program. A UserError becomes one sentence and exit status 1; a bug keeps its traceback."""
    for name in "stdin", "stdout", "stderr":  # closed ones would be the next open files
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    hasattr(sys.stdout, "reconfigure") and sys.stdout.reconfigure(
        errors="replace"
    )  # a terminal may lack some
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # `sample.py | head` has read enough
        os._exit(1)


def new_parser(text, **options):
    """An ArgumentParser whose help shows the program's own text; a mistake gets one sentence and exit status 2."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=text, formatter_class=layout, allow_abbrev=False, **options
    )
    parser.error = lambda message: parser.exit(
        2, f"{parser.prog}: {message}; see {parser.prog} --help\n"
    )
    return parser


def parse_int(text):
    """The int that a flag asks for; 1e9 is one, too."""
    if (number := float(text)) % 1 != 0 or abs(number) > 2**53:
        raise argparse.ArgumentTypeError(
            f"{text} must be a whole number below 2**53, for example 1000 or 1e3"
        )
    return int(number)


def format_time(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"  # h:mm:ss


class Progress:
    """A line on standard error with the time left: rewritten in place on a terminal, elsewhere once in 30 seconds."""

    def __init__(self, total, done=0):
        self.total, self.first, self.started = total, done, time.perf_counter()
        self.shown, self.terminal = self.started, sys.stderr.isatty()

    def rate(self, done):
        return (done - self.first) / (time.perf_counter() - self.started)

    def __call__(self, done, text):
        if time.perf_counter() - self.shown >= (0.2 if self.terminal else 30):
            self.shown = time.perf_counter()
            text = f"{text}, {format_time(max(0, self.total - done) / self.rate(done))} left"
            print(
                f"\r{text}\033[K" if self.terminal else f"{text}\n",
                file=sys.stderr,
                end="",
                flush=True,
            )

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def write_atomically(path, write_to):
    """Has write_to(temporary) write a file, then renames it to `path`: only a whole file replaces what was there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either
        raise UserError(
            f"{path} could not be written ({describe_error(error)}); what was there is intact: make room"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def newest_run():
    """The folder in out/ (but not below: those are compare.py's) with the youngest checkpoint. Raises UserError."""
    runs = sorted(OUT.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"there is no run in {OUT}/; train one first: python train.py")
    return runs[-1].parent


# --- Tokenizers. `spec` is what meta.json and every checkpoint keep of one; `tokenizer_from` makes it again ----------


class CharTokenizer:
    """One token per distinct character."""

    def __init__(self, chars):
        self.spec, self.vocab_size = {"kind": "char", "chars": chars}, len(chars)
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text):
        """Token ids, uint16. Raises UserError naming a character that the vocabulary lacks."""
        try:
            return np.fromiter(map(self.ids.__getitem__, text), np.uint16, len(text))
        except KeyError as error:
            (char,) = error.args
            raise UserError(
                f"character {char!r} (number {text.index(char) + 1} of the text) is not among the "
                f"{self.vocab_size} that this model knows: {self.spec['chars']!r}; leave it out"
            ) from None

    def decode(self, ids):
        """The text of these ids as UTF-8 bytes."""
        return "".join(self.spec["chars"][i] for i in ids).encode()


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken."""

    spec, vocab_size, end_of_text = {"kind": "gpt2"}, 50257, 50256

    def __init__(self):
        import tiktoken  # only when it is needed

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError(
                f"GPT-2's vocabulary cannot be downloaded ({describe_error(error)}); connect to the network once, "
                "or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from None

    def encode(self, text):
        return np.array(self.bpe.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids):
        """UTF-8 bytes, perhaps of half a character. Ids that only round the vocabulary up stand for nothing."""
        return self.bpe.decode_bytes([i for i in ids if i < self.vocab_size])


def tokenizer_from(spec):
    return CharTokenizer(spec["chars"]) if spec["kind"] == "char" else GPT2Tokenizer()


def tokenizer_size(spec):
    """Without making it. Raises LookupError where the specification is of no tokenizer."""
    return {"char": len(spec.get("chars", "")), "gpt2": GPT2Tokenizer.vocab_size}[spec["kind"]]


# --- A data set on disk ----------------------------------------------------------------------------------------------


def write_dataset(name, tokenizer, source, chunks):
    """Writes data/<name>/ from `chunks`, which yields ("train" or "val", token ids). Files are moved there when all are
    complete, meta.json last: an interrupted data set is none, and never passes for a whole one."""
    folder, tokens = DATA / name, {"train": 0, "val": 0}
    digests = {split: hashlib.sha256() for split in tokens}
    try:
        DATA.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DATA, prefix=f"{name}.", suffix=".tmp") as new:
            with (
                open(Path(new, "train.bin"), "wb") as train,
                open(Path(new, "val.bin"), "wb") as val,
            ):
                for split, ids in chunks:
                    ids = np.asarray(ids, dtype=np.uint16)
                    (train if split == "train" else val).write(ids)
                    tokens[split] += len(ids)
                    digests[split].update(ids)
            if min(tokens.values()) < 2:
                raise UserError(
                    f"{source} is too short to be split (tokens: {tokens}); give more text"
                )
            sha256 = {split: digest.hexdigest() for split, digest in digests.items()}
            meta = dict(tokenizer=tokenizer.spec, source=source, sha256=sha256, tokens=tokens)
            Path(new, "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            folder.mkdir(exist_ok=True)
            (folder / "meta.json").unlink(missing_ok=True)  # until it is back, no data set
            for file in "train.bin", "val.bin", "meta.json":
                os.replace(Path(new, file), folder / file)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written ({describe_error(error)}) and is as before; make room there"
        ) from None


def read_dataset(name):
    """A prepared data set: its meta.json as a dict, and {"train": ids, "val": ids} as read-only uint16 arrays on disk.
    Raises UserError, with the command to run, where it is missing, incomplete or damaged."""
    try:
        meta = json.loads((DATA / name / "meta.json").read_text(encoding="utf-8"))
        tokenizer_size(meta["tokenizer"])
        splits = {
            split: np.memmap(DATA / name / f"{split}.bin", np.uint16, "r")
            for split in ("train", "val")
        }
        if {split: hashlib.sha256(ids).hexdigest() for split, ids in splits.items()} != meta[
            "sha256"
        ]:
            raise ValueError("its tokens are not those that were written")
        return meta, splits
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        prepared = (
            ", ".join(sorted(path.parent.name for path in DATA.glob("*/meta.json"))) or "none"
        )
        source = (
            name
            if name in (*SOURCES, "openwebtext")
            else shlex.quote(f"PATH/{name.removesuffix('.txt')}.txt")
        )
        raise UserError(
            f"data set {name!r} is missing or damaged ({error}; prepared are: {prepared}); "
            f"run: python prepare.py {source}"
        ) from None


# --- Where text comes from -------------------------------------------------------------------------------------------


def read_text(path):
    """The text of a UTF-8 file; - is standard input."""
    try:
        return (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode(
            "utf-8-sig"
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({describe_error(error)}); mend the path or convert it"
        ) from None


def shakespeare():
    """Tiny Shakespeare, from data/shakespeare_char/input.txt if it lies there, else downloaded."""
    path = DATA / "shakespeare_char" / "input.txt"
    there, advice = (
        path.exists(),
        f"save {SHAKESPEARE_URL} as {path}, or take pydoc, which needs no download",
    )
    try:
        text = (
            read_text(path)
            if there
            else urllib.request.urlopen(SHAKESPEARE_URL, timeout=10).read().decode()
        )
    except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
        raise DownloadError(
            f"tiny Shakespeare cannot be downloaded ({describe_error(error)}); {advice}"
        ) from None
    if hashlib.sha256(text.encode()).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{path if there else SHAKESPEARE_URL} is not tiny Shakespeare (its SHA-256 differs); {advice}"
        )
    return text, SHAKESPEARE_URL


def pydoc():
    """The language reference that every Python carries for its help()."""
    from pydoc_data.topics import topics

    return "\n\n".join(
        topics[key] for key in sorted(topics)
    ), f"pydoc_data.topics of Python {sys.version.split()[0]}"


SOURCES = {
    "shakespeare_char": (shakespeare, "char"),
    "shakespeare": (shakespeare, "gpt2"),
    "pydoc": (pydoc, "char"),
}


def load_or_prepare(name):
    """A data set's name, meta and splits. Small ones are prepared on the way; None is tiny Shakespeare, or pydoc."""
    if name is None:
        try:
            return load_or_prepare("shakespeare_char")
        except DownloadError as error:
            print(f"{error}; training on pydoc, Python's language reference, instead")
            return load_or_prepare("pydoc")
    if name in SOURCES and not (DATA / name / "meta.json").exists():
        prepare_text(name, *SOURCES[name])
    return name, *read_dataset(name)


def prepare_text(name, read, tokenizer):
    """Writes data/<name>/ from what read() gives, a text and its source. The last tenth is for validation."""
    text, source = read()
    tokenizer = (
        CharTokenizer("".join(sorted(set(text)))) if tokenizer == "char" else GPT2Tokenizer()
    )
    cut = int(0.9 * len(text))
    write_dataset(
        name,
        tokenizer,
        source,
        (("train", tokenizer.encode(text[:cut])), ("val", tokenizer.encode(text[cut:]))),
    )


def openwebtext(tokenizer, limit):
    """Yields ("train", ids), or for every 2,000th document ("val", ids), until there are `limit` tokens."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("openwebtext needs one more package; run: pip install datasets") from None
    progress, count, done = Progress(min(limit, 9.04e9)), 0, 0  # tokens
    try:
        for batch in load_dataset(**OPENWEBTEXT, split="train", streaming=True).iter(512):
            for ids in tokenizer.bpe.encode_ordinary_batch(batch["text"]):
                ids = (ids + [tokenizer.end_of_text])[: limit - done]
                yield "train" if count % 2000 else "val", ids
                count, done = count + 1, done + len(ids)
                if done == limit:
                    return
            progress(done, f"{done / 1e6:,.1f}M of {progress.total / 1e6:,.0f}M tokens")
    except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"OpenWebText cannot be had ({describe_error(error)}); connect to the network, and try again"
        ) from None
    finally:
        progress.clear()


def main(argv=None):
    parser, known = new_parser(__doc__), (*SOURCES, "openwebtext")
    parser.add_argument(
        "name", metavar="NAME", help=f"{', '.join(known)}, or the path of a UTF-8 text file"
    )
    parser.add_argument(
        "--tokenizer", choices=("char", "gpt2"), help="for a text of your own (default: char)"
    )
    parser.add_argument(
        "--tokens",
        type=parse_int,
        help="openwebtext: stop after so many (default: all, 9 billion, 18 GB)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a data set of that name made of another file",
    )
    args = parser.parse_args(argv)
    web, name = (
        args.name == "openwebtext",
        args.name if args.name in known else Path(args.name).stem,
    )
    if args.tokenizer and args.name in known or args.tokens is not None and not web:
        parser.error(
            f"--tokenizer is for a text of your own, --tokens for openwebtext; leave it out for {args.name}"
        )
    if args.tokens is not None and args.tokens < 1:
        parser.error(f"--tokens={args.tokens} must be at least 1, for example 1e9")
    if name in known and name != args.name:
        parser.error(
            f"{args.name} would overwrite the data set {name!r}, whose name is taken; rename the file"
        )
    if web:
        tokenizer = GPT2Tokenizer()
        write_dataset(
            name, tokenizer, OPENWEBTEXT["path"], openwebtext(tokenizer, args.tokens or sys.maxsize)
        )
    elif name in known:
        prepare_text(name, *SOURCES[name])
    else:
        source = "standard input" if args.name == "-" else str(Path(args.name).resolve())
        with contextlib.suppress(
            OSError, LookupError, TypeError, ValueError
        ):  # no data set is there
            old = json.loads((DATA / name / "meta.json").read_text(encoding="utf-8"))["source"]
            if not args.overwrite and (old != source or args.name == "-"):
                parser.error(
                    f"{DATA / name} was made of {old}, and would be lost; rename the file, or add --overwrite"
                )
        prepare_text(name, lambda: (read_text(args.name), source), args.tokenizer or "char")
    meta, splits = read_dataset(name)
    print(
        f"{DATA / name}: {len(splits['train']):,} training and {len(splits['val']):,} validation tokens, vocabulary "
        f"of {tokenizer_size(meta['tokenizer']):,}\nto train on it: python train.py --dataset={shlex.quote(name)}"
    )


if __name__ == "__main__":
    run_program(main)
