"""A Markov chain whose next-token law is known."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from xentlab.contract import LabError, whole
from xentlab.sources.source import part_of

# The greatest table that MarkovSource makes, in probabilities: 64 MiB of float32.
MAX_TABLE = 2**24
ELIMINATED = 1024  # contexts, of which a chain is solved at once: a second


def _long_run(moves: np.ndarray) -> np.ndarray:
    """The stationary distribution [n] of a chain's transitions [n, n], each context taken out of the chain in turn."""
    left, share = moves.copy(), np.ones(len(moves))
    for last in range(len(moves) - 1, 0, -1):
        left[:last, last] /= left[last, :last].sum()
        left[:last, :last] += left[:last, last, None] * left[last, :last]
    for place in range(1, len(moves)):
        share[place] = share[:place] @ left[:place, place]
    return share / share.sum()


def _ends_in(later: np.ndarray, table: np.ndarray) -> np.ndarray | None:
    """The one part that a chain comes to and never leaves, as a mask [n], of the contexts `later` [n, V] that each leads to.

    None if there are several: how often it comes to which is not the chain's own.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    begun, token = np.nonzero(table)
    ended = later[begun, token]
    count, part = connected_components(csr_array((np.ones(len(begun)), (begun, ended)), (len(table),) * 2), connection="strong")
    last = np.setdiff1d(np.arange(count), part[begun][part[begun] != part[ended]])
    return part == last[0] if len(last) == 1 else None


def _finite(exponent: object) -> float:
    try:
        value = float(exponent) if hasattr(exponent, "__float__") else math.nan
    except (TypeError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise LabError(f"an exponent is a finite number; got {exponent!r}.")
    return value


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
        context = f"a Markov source needs vocab >= 2 and order >= 1, whole numbers; got {self.vocab!r} and {self.order!r}."
        seed = f"a seed is a whole number from 0 to {2**32 - 1}; got {self.seed!r}."
        known = {
            "vocab": whole(self.vocab, 2, context),
            "order": whole(self.order, 1, context),
            "exponent": _finite(self.exponent),
            "seed": whole(self.seed, 0, seed),
            "tokens": whole(self.tokens, 10, f"tokens, split into three, are at least 10; got {self.tokens!r}."),
        }
        for name, value in known.items():  # Python's own, which have a hash
            object.__setattr__(self, name, value)
        if self.vocab ** (self.order + 1) > MAX_TABLE:
            raise LabError(
                f"a law over {self.vocab}^{self.order} contexts has {self.vocab}^{self.order + 1} probabilities, more than "
                f"{MAX_TABLE:.1e}. Take a smaller vocabulary or order."
            )
        if self.seed >= 2**32:
            raise LabError(seed)

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
        """The next token's true distribution after each context, its last `order` tokens: [..., order] -> [..., V].

        NaN after a context with a token outside [0, V).
        """
        if contexts.shape[-1] != self.order:
            raise LabError(f"a context of this source is {self.order} tokens; got {contexts.shape[-1]}.")
        known = jnp.all((contexts >= 0) & (contexts < self.vocab), axis=-1, keepdims=True)
        return jnp.where(known, jnp.asarray(self.table, jnp.float32)[self._row(contexts)], jnp.nan)

    def _row(self, contexts):
        row = jnp.zeros(contexts.shape[:-1], jnp.int32)
        for place in range(self.order):
            row = row * self.vocab + contexts[..., place].astype(jnp.int32)
        return row

    @functools.cached_property
    def stationary(self) -> Float[np.ndarray, " contexts"]:
        """How often each context occurs in the long run, in float64, [contexts].

        Of up to 1,024 contexts by elimination without a subtraction (Grassmann, Taksar & Heyman 1985), which is right for a
        chain that hardly ever leaves a part of its contexts too; of more by power iteration. Raises `LabError` where that does
        not settle, and where the chain falls apart: float64 has no probability below 1e-323.
        """
        count = self.vocab**self.order
        later = np.arange(count)[:, None] % self.vocab ** (self.order - 1) * self.vocab + np.arange(self.vocab)
        inside = np.ones(count, bool) if self.table.all() else _ends_in(later, self.table)
        remedy = f"Take an exponent nearer to 0 than {self.exponent:g}."
        if inside is None:
            raise LabError(f"in float64 this chain falls into parts that it never leaves. {remedy}")
        share = inside / inside.sum()
        if count <= ELIMINATED:
            moves = np.zeros((count, count))
            np.put_along_axis(moves, later, self.table, axis=1)
            with np.errstate(all="ignore"):
                share[inside] = _long_run(moves[np.ix_(inside, inside)])
            if np.isfinite(share).all():
                return share
            raise LabError(f"this chain's long run is of products of probabilities that are 0 in float64. {remedy}")
        for _ in range(10_000):
            moved = np.einsum("ab,abc->bc", share.reshape(self.vocab, -1), self.table.reshape(self.vocab, -1, self.vocab))
            moved = moved.reshape(-1) / moved.sum()
            if np.abs(moved - share).sum() < 1e-15 * count**0.5:
                return moved
            share = moved
        raise LabError(
            f"after 10,000 steps this chain has not forgotten where it began. Take an exponent nearer to 0 than "
            f"{self.exponent:g}, or fewer contexts."
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
        return part_of(self._stream, part, 0.8, 0.1)

    def describe(self) -> dict:
        """What a run's record keeps of it."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "token_bytes"]  # a subclass's own too
        return {"kind": "markov", **{name: getattr(self, name) for name in fields}, "entropy_rate_nats": self.entropy_rate}
