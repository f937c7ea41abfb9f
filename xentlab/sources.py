"""Where tokens come from: a Markov chain whose law is known, or real text, split by position into three parts.

A source has the members of `Source`, and may have `law(contexts [..., order]) -> [..., V]`: training and race ask for no more,
so an object of your own with these works too.
"""

import codecs
import dataclasses
import functools
import hashlib
import pathlib
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from xentlab import defaults
from xentlab.contract import LabError

PARTS = ("train", "validation", "test")
# The greatest table that MarkovSource makes, in probabilities: 64 MiB of float32.
MAX_TABLE = 2**24
ELIMINATED = 1024  # contexts, of which a chain is solved at once: a second


@runtime_checkable
class Source(Protocol):
    """What training asks of a source.

    order: how many tokens its law reads, 0 without one. token_bytes: how many UTF-8 bytes each token stands for [V], or None.
    split: int32 tokens [N] of "train", "validation" or "test". describe: what a record keeps of it, as JSON has it.
    """

    name: str
    vocab: int
    order: int
    token_bytes: np.ndarray | None

    def split(self, part: str) -> np.ndarray: ...

    def describe(self) -> dict: ...


def checked_source(source: Source) -> Source:
    """The source itself, once it is seen to have what one must, and no token outside of its vocabulary. Raises `LabError`."""
    if isinstance(source, (str, pathlib.Path)):
        raise LabError(f"a source is an object, xentlab.sources.Text({str(source)!r}) or MarkovSource(...); got a path.")
    if lacks := [name for name in ("name", "vocab", "order", "token_bytes", "split", "describe") if not hasattr(source, name)]:
        raise LabError(f"a source has {', '.join(lacks)} too; {type(source).__name__} has not. See xentlab.sources.Source.")
    for part in PARTS:
        tokens = np.asarray(source.split(part))
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 1:
            raise LabError(f"a part is integer tokens [N]; {part} of {source.name} is {tokens.dtype} {list(tokens.shape)}.")
        bad = np.flatnonzero((tokens < 0) | (tokens >= source.vocab))
        if len(bad):
            raise LabError(
                f"{source.name} has token {tokens[bad[0]]} at place {bad[0]} of {part} ({len(bad)} such), outside of its "
                f"vocabulary of {source.vocab}. Did the tokenizer's vocabulary change?"
            )
    return source


def identity(described: dict) -> dict:
    """What a source's `describe()` says of what it is: neither where it lies, nor what was computed of it.

    The latter may differ by a rounding on another machine.
    """
    return {key: value for key, value in described.items() if key not in ("path", "name", "entropy_rate_nats")}


def _long_run(moves: np.ndarray) -> np.ndarray:
    """The stationary distribution [n] of a chain's transitions [n, n], each context taken out of the chain in turn."""
    left, share = moves.copy(), np.ones(len(moves))
    for last in range(len(moves) - 1, 0, -1):
        left[:last, last] /= left[last, :last].sum()
        left[:last, :last] += left[:last, last, None] * left[last, :last]
    for place in range(1, len(moves)):
        share[place] = share[:place] @ left[:place, place]
    return share / share.sum()


@dataclasses.dataclass(frozen=True)
class MarkovSource:
    """A Markov chain over `vocab` tokens whose next-token law, given the last `order` tokens, is known and Zipf-like.

    Each context's probabilities fall like rank^-exponent over its own random order of the tokens, blurred by a
    log-normal of scale 1/2. The same arguments give the same law and the same tokens. Raises `LabError` for a vocabulary
    below 2, an order below 1, a table of more than 2^24 probabilities, and a seed below 0 or from 2^32 on.

    >>> source = MarkovSource(vocab=4, seed=3)
    >>> source.law(jnp.array([[0], [3]])).shape  # two contexts of one token
    (2, 4)
    >>> float(source.entropy_rate) < float(np.log(4))
    True
    """

    vocab: int = 32
    order: int = 1
    exponent: float = 1.0
    seed: int = 0
    tokens: int = 200_000
    name: str = "markov"
    token_bytes: None = None

    def __post_init__(self):
        if self.vocab < 2 or self.order < 1:
            raise LabError(f"a Markov source needs vocab >= 2 and order >= 1; got {self.vocab} and {self.order}.")
        if self.vocab ** (self.order + 1) > MAX_TABLE:
            raise LabError(
                f"a law over {self.vocab}^{self.order} contexts has {self.vocab}^{self.order + 1} probabilities, more than "
                f"{MAX_TABLE:.1e}. Take a smaller vocabulary or order."
            )
        if not 0 <= self.seed < 2**32:
            raise LabError(f"a seed is a whole number from 0 to {2**32 - 1}; got {self.seed}.")
        if self.tokens < 10:
            raise LabError(f"{self.tokens} tokens are too few to split into three; ask for at least 10.")

    @functools.cached_property
    def table(self) -> Float[np.ndarray, "contexts vocab"]:
        """Every context's law, in float64; the row of a context reads its tokens as digits, the last one least."""
        rng = np.random.default_rng(self.seed)
        contexts = self.vocab**self.order
        ranks = rng.permuted(np.tile(np.arange(1, self.vocab + 1), (contexts, 1)), axis=1)
        log_law = -self.exponent * np.log(ranks) + 0.5 * rng.standard_normal(ranks.shape)
        law = np.exp(log_law - log_law.max(axis=1, keepdims=True))
        return law / law.sum(axis=1, keepdims=True)

    def law(self, contexts: Integer[Array, "*batch order"]) -> Float[Array, "*batch vocab"]:
        """The next token's true distribution after each context, its last `order` tokens: [..., order] -> [..., V]."""
        if contexts.shape[-1] != self.order:
            raise LabError(f"a context of this source is {self.order} tokens; got {contexts.shape[-1]}.")
        return jnp.asarray(self.table, jnp.float32)[self._row(contexts)]

    def _row(self, contexts):
        row = jnp.zeros(contexts.shape[:-1], jnp.int32)
        for place in range(self.order):
            row = row * self.vocab + contexts[..., place].astype(jnp.int32)
        return row

    @functools.cached_property
    def stationary(self) -> Float[np.ndarray, " contexts"]:
        """How often each context occurs in the long run, in float64, [contexts].

        Of up to 1,024 contexts by elimination without a subtraction (Grassmann, Taksar & Heyman 1985), which is right for a
        chain that hardly ever leaves a part of its contexts too; of more by power iteration, and raises `LabError` where
        that does not settle, or falls apart.
        """
        count = self.vocab**self.order
        if count <= ELIMINATED:
            moves = np.zeros((count, count))
            places = np.arange(count)[:, None] % self.vocab ** (self.order - 1) * self.vocab + np.arange(self.vocab)
            np.put_along_axis(moves, places, self.table, axis=1)
            with np.errstate(all="ignore"):
                found = _long_run(moves)
            if np.isfinite(found).all():
                return found
            raise LabError(f"this chain falls into parts that it never leaves. Take an exponent below {self.exponent:g}.")
        share = np.full(count, 1 / count)
        for _ in range(10_000):
            moved = np.einsum("ab,abc->bc", share.reshape(self.vocab, -1), self.table.reshape(self.vocab, -1, self.vocab))
            moved = moved.reshape(-1) / moved.sum()
            if np.abs(moved - share).sum() < 1e-15 * count**0.5:
                return moved
            share = moved
        raise LabError(
            f"after 10,000 steps this chain has not forgotten where it began. Take an exponent below {self.exponent:g}, or "
            "fewer contexts."
        )

    @functools.cached_property
    def entropy_rate(self) -> float:
        """The chain's entropy in nats a token: what no model's mean NLL can go below, in the long run."""
        from scipy.special import entr

        each = entr(self.table).sum(axis=1)
        return float(self.stationary @ each)

    @functools.partial(jax.jit, static_argnums=(0, 2, 3))
    def sample(self, key: Key[Array, ""], length: int, chains: int = 1) -> Integer[Array, "chains length"]:
        """Tokens of independent chains, each begun in the long run: [chains, length], drawn on the device."""
        log_table = jnp.log(jnp.asarray(self.table, jnp.float32))
        key, first = jax.random.split(key)
        rows = jax.random.categorical(first, jnp.log(jnp.asarray(self.stationary, jnp.float32)), shape=(chains,))
        rows = rows.astype(jnp.int32)

        def step(rows, key):
            token = jax.random.categorical(key, log_table[rows]).astype(jnp.int32)
            kept = rows % self.vocab ** (self.order - 1)  # the oldest token leaves
            return kept * self.vocab + token, token

        _, tokens = jax.lax.scan(step, rows, jax.random.split(key, length))
        return tokens.T

    @functools.cached_property
    def _stream(self) -> np.ndarray:
        # 64 chains side by side, one after another in the stream: 1/64 of the steps, and 63 joints that the law does
        # not explain, out of at least 10,000 tokens.
        chains = 64 if self.tokens >= 64 * 160 else 1
        drawn = self.sample(jax.random.key(self.seed), -(-self.tokens // chains), chains)
        return np.asarray(drawn).reshape(-1)[: self.tokens]

    def split(self, part: str) -> np.ndarray:
        """The tokens of one part, int32 [N]: the first 80% train, then 10% validation, then 10% test."""
        return _part(self._stream, part, 0.8, 0.1)

    def describe(self) -> dict:
        """What a run's record keeps of it."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "token_bytes"]  # a subclass's own too
        return {"kind": "markov", **{name: getattr(self, name) for name in fields}, "entropy_rate_nats": self.entropy_rate}


def _part(sequence, part: str, train: float, validation: float):
    if part not in PARTS:
        raise LabError(f"a part is one of {', '.join(PARTS)}; got {part!r}.")
    first, second = int(len(sequence) * train), int(len(sequence) * (train + validation))
    return {"train": sequence[:first], "validation": sequence[first:second], "test": sequence[second:]}[part]


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

    Without the byte order mark that some editors begin a file with: it is no text.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        try:
            files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        except OSError as error:
            raise LabError(f"cannot read {error.filename or path}: {error.strerror}.") from error
        if not files:
            raise LabError(f"{path} has no files in it. Give a UTF-8 text file, or a folder of them.")
    elif path.is_file():
        files = [path]
    else:
        raise LabError(f"no file or folder {path}. Give a UTF-8 text file, or a folder of them.")
    texts = []
    for file in files:
        try:
            # Bytes, not read_text: that would turn \r\n into \n, and the bytes are what is counted.
            texts.append(file.read_bytes().decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as error:
            found, at = error.object, error.start
            encoding = "utf-16" if found.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
            raise LabError(
                f"{file} is not UTF-8: byte {at} is {found[at]:#04x}. "
                f"Convert it first (iconv -f {encoding} -t utf-8), or leave it out of the folder."
            ) from error
        except OSError as error:
            raise LabError(f"cannot read {file}: {error.strerror}.") from error
    return "\n".join(texts)


def _hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


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
        if self.tokenizer == "bpe" and self.bpe_vocab <= 256:
            raise LabError(f"a byte-level BPE has 256 bytes and at least one merge: bpe_vocab > 256; got {self.bpe_vocab}.")
        if not self.text.strip():
            raise LabError(f"{self.path} is empty. Give a text of some thousand characters.")
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
        tokenizer.train_from_iterator(_pieces(_part(self.text, "train", 0.9, 0.05)), trainer)
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
        return {part: self.encode(_part(self.text, part, 0.9, 0.05)) for part in PARTS}

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


def _pieces(text: str, size: int = 100_000) -> list[str]:
    """A long text in pieces that the tokenizer takes one at a time."""
    return [text[start : start + size] for start in range(0, len(text), size)] or [""]
