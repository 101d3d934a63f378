"""Turns text into tokens: a folder data/<name>/ with meta.json, which says how to read the rest.

    python prepare.py shakespeare_char           tiny Shakespeare, a token for each character (1 MB)
    python prepare.py shakespeare                the same text in GPT-2's byte-pair encoding
    python prepare.py pydoc                      Python's language reference: needs no download
    python prepare.py openwebtext --tokens=1e9   so much of OpenWebText, in GPT-2's encoding
    python prepare.py PATH.txt                   a text of your own, by characters
    python prepare.py PATH.txt --tokenizer=gpt2  or in GPT-2's encoding

OpenWebText is read in parts: the same command, or one for more tokens, goes on where it stopped.
"""

import argparse
import contextlib
import difflib
import errno
import hashlib
import http.client
import json
import os
import re
import shlex
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

DATA, OUT = Path("data"), Path("out")  # the data sets, and the runs that train.py makes

# --- How all programs here talk to their user and write files ------------------------------------


class UserError(ValueError):
    """Something that the user can put right: a sentence that says what is wrong and what to do."""


class DownloadError(UserError):
    """The network did not give what was asked for."""


def describe_error(error):
    """An exception's own words, in one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())[:200]


def run_program(main):
    """Runs a program. A UserError becomes a sentence and exit status 1; a bug has its traceback."""
    program = Path(sys.argv[0]).name
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot do that
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    try:
        main()
        print(end="", flush=True)  # if that fails, it fails here
    except UserError as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        # What fails here is standard output, for an error of a file has become a UserError. Its
        # reader has left, as in `sample.py | head`, or its disk is full. Python's own exit would
        # try to write once more.
        if error.errno == errno.ENOSPC:
            words = f"{program}: the output cannot be written (the disk is full); make room for it"
            print(words, file=sys.stderr, flush=True)
        elif error.errno != errno.EPIPE:
            raise
        os._exit(1)


def new_parser(text, **options):
    """An ArgumentParser whose help is the program's own text. A mistake gets a sentence."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=text, formatter_class=layout, allow_abbrev=False, **options
    )

    def refuse(message):
        # Beside a flag that does not exist stands the one that is spelt most like it.
        if message.startswith("unrecognized"):
            names = re.findall(r"--(\w+)", parser.format_usage())
            for wrong in re.findall(r"--([\w-]+)", message):
                for similar in difflib.get_close_matches(wrong, names, n=1, cutoff=0.7):
                    message += f"; is --{wrong} meant to be --{similar}?"
        parser.exit(2, f"{parser.prog}: {message}; see {parser.prog} --help\n")

    parser.error = refuse
    return parser


def parse_int(text):
    """The whole number that a flag gives; 1e9 is one, too."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer() or abs(number) > 2**53:
        raise argparse.ArgumentTypeError(
            f"{text} must be a whole number below 2**53, for example 1000 or 1e3"
        )
    return int(number)


def format_time(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Progress:
    """A line on standard error with the time left: rewritten in place on a terminal, and elsewhere
    (in a log file) printed every 30 seconds."""

    def __init__(self, total, done=0):
        self.total, self.first, self.started = total, done, time.perf_counter()
        self.shown, self.terminal = self.started, sys.stderr.isatty()

    def rate(self, done):
        """How much was done in a second."""
        return (done - self.first) / (time.perf_counter() - self.started)

    def __call__(self, done, text):
        interval = 0.2 if self.terminal else 30
        if time.perf_counter() - self.shown < interval:
            return
        self.shown = time.perf_counter()
        left = format_time(max(0, self.total - done) / self.rate(done))
        line = f"{text}, {left} left"
        line = f"\r{line}\033[K" if self.terminal else f"{line}\n"
        print(line, file=sys.stderr, end="", flush=True)

    def clear(self):
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def explain_failure(path):
    """Whatever fails while `path` is written becomes a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises either
        raise UserError(
            f"{path} could not be written ({describe_error(error)}); what was there is unchanged: "
            "make room for it, or remove the cause"
        ) from None


def write_atomically(path, write_to):
    """Has write_to(temporary) write a file, then renames it to `path`: only a whole file replaces
    what was there. Raises UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with explain_failure(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_to(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_figure(figure, path):
    """Writes a matplotlib figure as PNG, whole or not at all. Raises UserError."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def newest_run():
    """The folder in out/ with the youngest checkpoint. Raises UserError where there is none."""
    runs = sorted(OUT.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError(f"there is no run in {OUT}/; train one first: python train.py")
    return runs[-1].parent


# --- Tokenizers: text to token ids, and back ------------------------------------------------------


class Tokenizer:
    """What both have: `vocab_size`; `spec`, by which tokenizer_from makes it again, and which
    meta.json and every checkpoint keep; `encode`, from a text to a list of token ids; and back,
    `decode_bytes` and `decode`."""

    def decode(self, ids):
        """The text of token ids: a list, an array or a tensor (T,). A character of which a part is
        missing becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


class CharTokenizer(Tokenizer):
    """A token for each distinct character."""

    def __init__(self, chars):
        self.chars, self.vocab_size = chars, len(chars)
        self.spec = {"kind": "char", "chars": chars}
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text):
        """Token ids, a list. Raises UserError naming a character that the vocabulary lacks."""
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            (char,) = error.args
            raise UserError(
                f"character {char!r} (number {text.index(char) + 1} of the text) is not among the "
                f"{self.vocab_size} that this model knows; leave it out, or take another model"
            ) from None

    def decode_bytes(self, ids):
        """UTF-8 bytes. Ids that only round a model's vocabulary up stand for nothing."""
        return "".join(self.chars[i] for i in ids if i < self.vocab_size).encode()


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken."""

    spec, vocab_size, end_of_text = {"kind": "gpt2"}, 50257, 50256

    def __init__(self):
        import tiktoken  # only when it is needed

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise UserError(
                f"GPT-2's vocabulary cannot be downloaded ({describe_error(error)}); connect to "
                "the network once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from None

    def encode(self, text):
        """Token ids, a list."""
        return self.bpe.encode_ordinary(text)

    def decode_bytes(self, ids):
        """UTF-8 bytes, perhaps of a part of a character. Ids that only round a model's vocabulary
        up stand for nothing."""
        return self.bpe.decode_bytes([i for i in ids if i < self.vocab_size])


def tokenizer_from(spec):
    """The tokenizer of a specification."""
    return CharTokenizer(spec["chars"]) if spec["kind"] == "char" else GPT2Tokenizer()


def tokenizer_size(spec):
    """Its vocabulary's size, without making it."""
    return len(spec["chars"]) if spec["kind"] == "char" else GPT2Tokenizer.vocab_size


# --- A data set on disk ---------------------------------------------------------------------------
#
# meta.json says what a data set is; what it does not name is no part of that. It has
#
#     source      where the text is from
#     tokenizer   its specification
#     files       for each split ("train" and "val"), which file has its tokens, as uint16
#     tokens      how many of them belong to the data set
#     sha256      their digest; where a split has grown, of the digest before and the new tokens
#     documents   how many documents were read (OpenWebText only)
#
# So tokens are written first, to files of new names, or behind what a file holds already. Then
# meta.json is replaced, in one instant. Whatever fails before leaves the data set that was there.


def new_meta(tokenizer, source):
    """The meta.json of a data set that has no tokens yet."""
    return {
        "source": source,
        "tokenizer": tokenizer.spec,
        "files": {},
        "tokens": {"train": 0, "val": 0},
        "sha256": {"train": "", "val": ""},
    }


def write_dataset(name, meta, splits):
    """Adds tokens, {"train": ids, "val": ids}, to the data set that `meta` describes, and brings
    both `meta` and data/<name>/meta.json up to date. Raises UserError."""
    folder = DATA / name
    try:
        for split, ids in splits.items():
            write_tokens(folder, meta, split, np.asarray(ids, dtype=np.uint16))
        text = json.dumps(meta, indent=1) + "\n"
        write_atomically(
            folder / "meta.json", lambda temporary: temporary.write_text(text, encoding="utf-8")
        )
    finally:
        remove_leftovers(folder)


def write_tokens(folder, meta, split, ids):
    """Writes a split's first tokens to a new file, and later ones behind those that count."""
    digest = hashlib.sha256(meta["sha256"][split].encode())
    digest.update(ids)
    meta["sha256"][split] = digest.hexdigest()
    if split not in meta["files"]:
        meta["files"][split] = f"{split}-{meta['sha256'][split][:12]}.bin"
        path = folder / meta["files"][split]
        write_atomically(path, lambda temporary: temporary.write_bytes(ids))
    else:
        path = folder / meta["files"][split]
        with explain_failure(path), open(path, "r+b") as file:
            file.seek(meta["tokens"][split] * ids.itemsize)
            file.write(ids)
    meta["tokens"][split] += len(ids)


def remove_leftovers(folder):
    """Removes what meta.json does not name: an earlier data set, and what was left half-written."""
    try:
        named = set(read_meta(folder.name)["files"].values())
    except (OSError, LookupError):
        named = set()
    for pattern in "train*.bin*", "val*.bin*", "meta.json.*.tmp":
        for path in list(folder.glob(pattern)):
            if path.name not in named:
                # Another process may have removed it, or still read it.
                with contextlib.suppress(OSError):
                    path.unlink()


def read_meta(name):
    """data/<name>/meta.json, a dict. Raises OSError where there is none."""
    return json.loads((DATA / name / "meta.json").read_text(encoding="utf-8"))


def read_dataset(name):
    """A prepared data set: its meta.json, a dict, and {"train": ids, "val": ids}, read-only arrays
    (tokens,) of uint16 that stay on disk. Raises UserError, with the command to run, where it is
    missing or damaged."""
    if Path(name).name != name:
        raise UserError(
            f"{name!r} is no data set: it must be the plain name of a folder in {DATA}/, "
            f"for example {Path(name).name}"
        )
    try:
        meta = read_meta(name)
        splits = {}
        for split, file in meta["files"].items():
            # This raises ValueError where the file is too short.
            shape = (meta["tokens"][split],)
            splits[split] = np.memmap(DATA / name / file, np.uint16, mode="r", shape=shape)
        return meta, splits
    except (OSError, LookupError, ValueError) as error:
        prepared = sorted(path.parent.name for path in DATA.glob("*/meta.json"))
        source = name if name in KNOWN else shlex.quote(f"PATH/{name}.txt")
        raise UserError(
            f"data set {name!r} is missing or damaged ({error}; prepared are: "
            f"{', '.join(prepared) or 'none'}); run: python prepare.py {source}"
        ) from None


# --- Where text comes from ------------------------------------------------------------------------

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(path):
    """The text of a UTF-8 file; - is standard input. Raises UserError."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({describe_error(error)}); mend the path or "
            "convert it"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{path} has NUL characters in it, as UTF-16 text has when it is read as UTF-8; "
            "convert it to UTF-8"
        )
    return text


def shakespeare():
    """Tiny Shakespeare, from data/shakespeare_char/input.txt if it lies there, else downloaded."""
    place = DATA / "shakespeare_char" / "input.txt"
    advice = f"save {SHAKESPEARE_URL} as {place} (make that folder)"
    if place.exists():
        text = read_text(place)
    else:
        place = SHAKESPEARE_URL
        try:
            text = urllib.request.urlopen(place, timeout=10).read().decode()
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            raise DownloadError(
                f"tiny Shakespeare cannot be downloaded ({describe_error(error)}); {advice}"
            ) from None
    if hashlib.sha256(text.encode()).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f"{place} is not tiny Shakespeare (its SHA-256 differs); {advice}")
    return text, SHAKESPEARE_URL


def pydoc():
    """The language reference that every Python carries for its help()."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    return text, f"pydoc_data.topics of Python {sys.version.split()[0]}"


# Texts that are prepared by their name alone: who reads them, and the tokenizer.
TEXTS = {
    "shakespeare_char": (shakespeare, "char"),
    "shakespeare": (shakespeare, "gpt2"),
    "pydoc": (pydoc, "char"),
}
KNOWN = (*TEXTS, "openwebtext")


def prepare_text(name, read, tokenizer):
    """Writes data/<name>/ from what read() gives, a text and its source. The last tenth of the text
    is for validation. Raises UserError."""
    text, source = read()
    if tokenizer == "gpt2":
        tokenizer = GPT2Tokenizer()
    else:
        tokenizer = CharTokenizer("".join(sorted(set(text))))
        if tokenizer.vocab_size > 2**16:
            raise UserError(
                f"{source} has {tokenizer.vocab_size:,} distinct characters, and a token has 16 "
                "bits, for 65,536 at most; add --tokenizer=gpt2"
            )
    cut = int(0.9 * len(text))
    splits = {"train": tokenizer.encode(text[:cut]), "val": tokenizer.encode(text[cut:])}
    tokens = {split: len(ids) for split, ids in splits.items()}
    if min(tokens.values()) < 2:
        raise UserError(f"{source} is too short to be split (tokens: {tokens}); give more text")
    write_dataset(name, new_meta(tokenizer, source), splits)


def load_or_prepare(name):
    """A data set's name, meta and splits. A text that needs no more than its name is prepared on
    the way; None is tiny Shakespeare, or pydoc where it cannot be downloaded."""
    if name is None:
        try:
            return load_or_prepare("shakespeare_char")
        except DownloadError as error:
            print(f"training on pydoc, Python's language reference, instead: {error}")
            return load_or_prepare("pydoc")
    if name in TEXTS and not (DATA / name / "meta.json").exists():
        try:
            prepare_text(name, *TEXTS[name])
        except UserError:
            # Of several processes that prepare it at once, the first removes what others write.
            if not (DATA / name / "meta.json").exists():
                raise
    return name, *read_dataset(name)


# --- OpenWebText, which is too large to be read in one go -----------------------------------------

# The Hub itself keeps this branch, in Parquet: `datasets` runs no data set's own script any more.
OPENWEBTEXT = dict(path="Skylion007/openwebtext", revision="refs/convert/parquet")


def prepare_openwebtext(limit):
    """Adds documents to data/openwebtext/ until it has `limit` tokens, or all there are. After
    every 512 documents it is a whole data set. So nothing is lost when the stream breaks, and the
    next call goes on from there. Every 2,000th document is for validation. Raises UserError."""
    tokenizer = GPT2Tokenizer()
    try:
        meta, _ = read_dataset("openwebtext")
        print(f"{meta['documents']:,} documents are there already; going on behind them")
    except UserError:
        meta = {**new_meta(tokenizer, OPENWEBTEXT["path"]), "documents": 0}
    done, total = sum(meta["tokens"].values()), min(limit, 9.04e9)  # as many as there are
    progress = Progress(total, done)
    stream = read_openwebtext(meta["documents"])
    try:
        while done < limit and (texts := next(stream, None)):
            splits = {"train": [], "val": []}
            for ids in tokenizer.bpe.encode_ordinary_batch(texts):
                split = "val" if meta["documents"] % 2000 == 0 else "train"
                splits[split] += [*ids, tokenizer.end_of_text]
                meta["documents"] += 1
            write_dataset("openwebtext", meta, splits)
            done = sum(meta["tokens"].values())
            progress(done, f"{done / 1e6:,.1f}M of {total / 1e6:,.0f}M tokens")
    finally:
        progress.clear()


def read_openwebtext(skip):
    """Yields lists of up to 512 documents, after those that are to be skipped. Raises UserError."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("openwebtext needs one more package; run: pip install datasets") from None
    try:
        stream = load_dataset(**OPENWEBTEXT, split="train", streaming=True)
        for batch in stream.skip(skip).iter(512):
            yield batch["text"]
    except Exception as error:  # of whichever library the Hub is read by
        raise UserError(
            f"the stream of OpenWebText broke ({describe_error(error)}); what was read is kept: "
            "connect to the network and give the same command to go on"
        ) from None


# --- The program ----------------------------------------------------------------------------------


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument(
        "name",
        metavar="NAME",
        help=f"{', '.join(KNOWN)}, or the path of a UTF-8 text file (-: the standard input)",
    )
    parser.add_argument(
        "--tokenizer",
        choices=("char", "gpt2"),
        help="tokenizer of a text of your own: characters, or GPT-2's byte pairs (default: char)",
    )
    parser.add_argument(
        "--tokens",
        type=parse_int,
        help="number of tokens of openwebtext to read (default: all 9 billion, 18 GB)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a data set of the same name that was made of another file",
    )
    args = parser.parse_args(argv)
    if (args.tokenizer and args.name in KNOWN) or (args.tokens and args.name != "openwebtext"):
        parser.error(
            "--tokenizer is for a text of your own, --tokens for openwebtext; leave it out for "
            f"{args.name}"
        )
    if args.tokens is not None and args.tokens < 1e6:
        parser.error(f"--tokens={args.tokens} must be at least 1e6, for example 1e9")

    if args.name == "openwebtext":
        name = args.name
        prepare_openwebtext(args.tokens or sys.maxsize)
    elif args.name in TEXTS:
        name = args.name
        prepare_text(name, *TEXTS[name])
    else:
        # A text of your own. It must not replace another, if only by its name.
        name = Path(args.name).stem
        source = "standard input" if args.name == "-" else str(Path(args.name).resolve())
        if name in KNOWN:
            parser.error(
                f"{args.name} would overwrite the data set {name!r}, whose name is taken; rename "
                "the file"
            )
        with contextlib.suppress(OSError):  # there is none of that name
            old = read_meta(name)["source"]
            if not args.overwrite and (old != source or args.name == "-"):
                parser.error(
                    f"{DATA / name} was made of {old}, and would be lost; rename the file, or add "
                    "--overwrite"
                )
        prepare_text(name, lambda: (read_text(args.name), source), args.tokenizer)
    meta, splits = read_dataset(name)
    print(
        f"{DATA / name}: {len(splits['train']):,} training and {len(splits['val']):,} validation "
        f"tokens, vocabulary of {tokenizer_size(meta['tokenizer']):,}\n"
        f"to train on it: python train.py --dataset={shlex.quote(name)}"
    )


if __name__ == "__main__":
    run_program(main)
