"""Real text, by bytes or through a BPE vocabulary that is trained on it."""

import codecs
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Literal

import numpy as np

from xentlab import defaults
from xentlab.contract import LabError, whole
from xentlab.names import expanded
from xentlab.sources.source import PARTS, part_of

PIECE = 100_000  # characters of a long text, which the tokenizer takes one at a time
# By the bytes that a file begins with: UTF-32's first, which begin with UTF-16's.
MARKS = {
    (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE): "utf-32",
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE): "utf-16",
}
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, zip, bzip2, xz, zstandard


@functools.cache
def builtin_text() -> str:
    """Real English that every Python holds: the language's reference topics, some 400,000 characters.

    Every paragraph once, where it stands first: some topics hold others whole, and what is tested on would have been trained
    on. It changes with the Python version, so every record keeps its hash.
    """
    from pydoc_data.topics import topics

    paragraphs = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values())


def read_text(path: str | pathlib.Path) -> str:
    """A UTF-8 file's text, or that of every file in a folder, in the order of their names, hidden ones left out.

    Without the byte order mark that some editors begin a file with: it is no text. Raises `LabError` for what cannot be read,
    is no UTF-8, or is not there.
    """
    if not isinstance(path, str | os.PathLike):
        raise LabError(f"a text is given as the path of a UTF-8 file or of a folder of them; got {path!r}.")
    path = expanded(path)
    if path.is_dir():
        if not (files := _files(path)):
            raise LabError(f"{path} has no files in it. Give a UTF-8 text file, or a folder of them.")
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise LabError(f"{path} can be read once, and a race is repeated from its text. Write it into a file first.")
    else:
        raise LabError(f"no file or folder {path}. Give a UTF-8 text file, or a folder of them.")
    texts = []
    for file in files:
        try:
            # Bytes, not read_text: that would turn \r\n into \n, and the bytes are what is counted.
            texts.append(file.read_bytes().decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            found, at = error.object, error.start
            encoding = next((name for marks, name in MARKS.items() if found.startswith(marks)), "latin1")
            remedy = "Unpack it first" if found.startswith(PACKED) else f"Convert it first (iconv -f {encoding} -t utf-8)"
            raise LabError(
                f"{file} is not UTF-8: byte {at} is {found[at]:#04x}. {remedy}, or leave it out of the folder."
            ) from error
        except OSError as error:
            raise LabError(f"cannot read {file}: {error.strerror}.") from error
    return "\n".join(texts)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files in a folder and those within it, linked ones too, in the order of their names, but for hidden ones.

    A folder that several ways lead to counts once. Raises `LabError` for one that cannot be read: not to say that a part of
    the text is missing would be worse.
    """
    found, known = [], set()

    def refused(error):
        raise LabError(f"cannot read {error.filename or folder}: {error.strerror}.") from error

    for here, within, names in os.walk(folder, onerror=refused, followlinks=True):
        if (place := os.path.realpath(here)) in known:
            within.clear()
            continue
        known.add(place)
        within[:] = sorted(name for name in within if not name.startswith("."))
        found += [pathlib.Path(here, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())


@dataclasses.dataclass(frozen=True)
class Text:
    """Real text as tokens: a UTF-8 file or folder, or without a path the English that comes with Python.

    tokenizer "bytes" has one token a UTF-8 byte, vocab 256; "bpe" trains a byte-level BPE of at most `vocab` tokens on the
    training part alone (needs the extra `bpe`). The text is split by position, 90% train, 5% validation, 5% test, before
    it is tokenized. Raises `LabError` for a missing, empty, too short or undecodable text.

    >>> text = Text()
    >>> text.vocab, text.split("train").dtype
    (256, dtype('int32'))
    """

    path: str | pathlib.Path | None = None
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    bpe_vocab: int = defaults.BPE_VOCAB
    order: int = dataclasses.field(default=0, init=False)
    law: None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        if self.tokenizer not in ("bytes", "bpe"):
            raise LabError(f"a tokenizer is bytes or bpe; got {self.tokenizer!r}.")
        if self.tokenizer == "bpe":
            least = "a byte-level BPE has 256 bytes and at least one merge: bpe_vocab > 256, a whole number; got "
            object.__setattr__(self, "bpe_vocab", whole(self.bpe_vocab, 257, f"{least}{self.bpe_vocab!r}."))
        if not self.text.strip():
            what = "blank" if self.text else "empty"
            raise LabError(f"{self.path} is {what}. Give a text of some thousand characters.")
        if len(self.text) < 1000:
            raise LabError(
                f"{self.path} has {len(self.text)} characters, too few to train, validate and test on; give at least 1000."
            )

    @functools.cached_property
    def text(self) -> str:
        """The whole text."""
        return builtin_text() if self.path is None else read_text(self.path)

    @property
    def name(self) -> str:
        """ "text" for the built-in one, or the file's or folder's name."""
        return "text" if self.path is None else pathlib.Path(self.path).resolve().name

    @functools.cached_property
    def _bpe(self):
        try:
            import tokenizers
        except ImportError:
            raise LabError("a BPE vocabulary needs a package: pip install tokenizers. Or take tokenizer bytes.") from None
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.bpe_vocab,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_pieces(part_of(self.text, "train", 0.9, 0.05)), trainer)
        return tokenizer

    @functools.cached_property
    def vocab(self) -> int:
        """The vocabulary's size."""
        return 256 if self.tokenizer == "bytes" else self._bpe.get_vocab_size()

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """How many UTF-8 bytes each token stands for, [V]."""
        if self.tokenizer == "bytes":
            return np.ones(256, np.int64)
        # In the byte-level alphabet every character of a token stands for one byte.
        return np.array([len(self._bpe.id_to_token(i)) for i in range(self.vocab)])

    def encode(self, text: str) -> np.ndarray:
        """A text's tokens, int32 [N]."""
        if self.tokenizer == "bytes":
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return np.concatenate([np.asarray(self._bpe.encode(piece).ids, np.int32) for piece in _pieces(text)])

    def decode(self, tokens: np.ndarray) -> str:
        """The text that tokens stand for; bytes that are no UTF-8 become the replacement character."""
        if self.tokenizer == "bytes":
            return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")
        return self._bpe.decode([int(token) for token in tokens])

    @functools.cached_property
    def _parts(self) -> dict[str, np.ndarray]:
        return {part: self.encode(part_of(self.text, part, 0.9, 0.05)) for part in PARTS}

    def split(self, part: str) -> np.ndarray:
        """The tokens of one part, int32 [N]."""
        if part not in PARTS:
            raise LabError(f"a part is one of {', '.join(PARTS)}; got {part!r}.")
        return self._parts[part]

    def describe(self) -> dict:
        """What a run's record keeps of it."""
        return {
            "kind": "text",
            "name": self.name,
            "path": None if self.path is None else str(self.path),
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "characters": len(self.text),
            "tokenizer": self.tokenizer,
            "vocab": self.vocab,
        }


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)] or [""]
