"""Small next-token models: bigram, n-gram MLP, causal transformer. Each gives hidden states; the head is its `weight`.

A model is any pytree with two members, which a head of any kind can use:

- `.hidden(tokens [..., T]) -> [..., T, D]`: position i has read tokens 0..i, and predicts token i + 1;
- `.weight [D, V]`: the logits are `hidden @ weight`.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from xentlab.contract import FAILURES, LabError, in_short
from xentlab.names import from_table, parse_call, with_settings
from xentlab.products import turned

Tokens = Integer[Array, "*batch time"]
Hidden = Float[Array, "*batch time features"]
Logits = Float[Array, "*batch time vocab"]

# The scale of a fresh head: logits begin near 0, a uniform prediction, for every loss alike.
HEAD_SCALE = 0.02
GELU, CUBE = math.sqrt(8 / math.pi), 0.044715


def _normals(key, *shapes):
    """Standard normal arrays of these shapes, by one draw: XLA takes a quarter of a second to compile each."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1].tolist())
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@jax.custom_vjp
def _dense(x, matrix):
    """x [..., D] @ matrix [D, F], whose gradient by the matrix is fast on a CPU too. In reverse mode, or forward over that."""
    return x @ matrix


def _dense_backward(kept, pull):
    x, matrix = kept
    # A transformer's step on a CPU takes .6 of the time by this.
    return pull @ matrix.T, turned(x.reshape(-1, x.shape[-1])) @ pull.reshape(-1, pull.shape[-1])


_dense.defvjp(lambda x, matrix: (x @ matrix, (x, matrix)), _dense_backward)


@jax.custom_jvp
def _gelu(x):
    """jax.nn.gelu to rounding: x / (1 + exp(-2u)) is x (1 + tanh u) / 2. Hendrycks & Gimpel 2016.

    A division is made once, where XLA on a CPU would make jax.nn.gelu's products anew for each use, and its derivative, written
    by itself, with a tanh less.
    """
    return x / (1 + jnp.exp(-_gelu_odds(x)))


@_gelu.defjvp
def _gelu_forward(primals, tangents):
    (x,), (tangent,) = primals, tangents
    y = _gelu(x)
    share = jax.nn.sigmoid(_gelu_odds(x))  # whose own derivative is finite where the exponential is not
    return y, tangent * (share + y * (1 - share) * GELU * (1 + 3 * CUBE * x**2))


def _gelu_odds(x):
    return GELU * (1 + CUBE * x**2) * x


class Bigram(eqx.Module):
    """Reads the last token alone. Low-rank with `features`, or a full table [V, V] with none.

    >>> model = Bigram(5, key=jax.random.key(0))
    >>> model.hidden(jnp.array([3, 1])).shape, model.weight.shape
    ((2, 5), (5, 5))
    """

    embedding: Float[Array, "vocab features"] | None
    weight: Float[Array, "features vocab"]

    def __init__(self, vocab: int, *, features: int | None = None, key: Key[Array, ""]):
        if features is None:
            self.embedding, (weight,) = None, _normals(key, (vocab, vocab))
        else:
            self.embedding, weight = _normals(key, (vocab, features), (features, vocab))
        self.weight = HEAD_SCALE * weight

    def hidden(self, tokens: Tokens) -> Hidden:
        """The last token's features, or the token itself as a one-hot row: [..., T] -> [..., T, D]."""
        if self.embedding is None:
            return jax.nn.one_hot(tokens, self.weight.shape[0], dtype=self.weight.dtype)
        return self.embedding[tokens]


class MLP(eqx.Module):
    """Reads the last `context` tokens through one hidden layer, as Bengio et al. 2003 do.

    >>> MLP(5, key=jax.random.key(0)).hidden(jnp.array([3, 1])).shape
    (2, 64)
    """

    embedding: Float[Array, "vocab width"]
    mixing: Float[Array, "context width inner"]
    bias: Float[Array, " inner"]
    projection: Float[Array, "inner features"]
    weight: Float[Array, "features vocab"]

    def __init__(
        self, vocab: int, *, context: int = 8, width: int = 32, inner: int = 128, features: int = 64, key: Key[Array, ""]
    ):
        shapes = ((vocab, width), (context, width, inner), (inner, features), (features, vocab))
        self.embedding, mixing, projection, weight = _normals(key, *shapes)
        self.mixing = (context * width) ** -0.5 * mixing
        self.bias = jnp.zeros(inner)
        self.projection = inner**-0.5 * projection
        self.weight = HEAD_SCALE * weight

    def hidden(self, tokens: Tokens) -> Hidden:
        """Features of the last `context` tokens, zeros before the first: [..., T] -> [..., T, D]."""
        embedded, time = self.embedding[tokens], tokens.shape[-1]
        places = min(self.mixing.shape[0], time)
        # One product over the context's places side by side, each shifted: eight small ones and their sums take longer.
        padded = jnp.pad(embedded, ((0, 0),) * (embedded.ndim - 2) + ((places - 1, 0), (0, 0)))
        shifted = [jax.lax.slice_in_dim(padded, back, back + time, axis=-2) for back in reversed(range(places))]
        mixed = _dense(jnp.concatenate(shifted, axis=-1), self.mixing[:places].reshape(-1, len(self.bias)))
        inner = mixed + jnp.broadcast_to(self.bias, mixed.shape)
        return _dense(_gelu(inner), self.projection)


class Block(eqx.Module):
    """Causal attention and an MLP, each behind a root-mean-square norm and a residual."""

    qkv: Float[Array, "features three heads size"]
    out: Float[Array, "heads size features"]
    up: Float[Array, "features inner"]
    down: Float[Array, "inner features"]

    def __init__(self, features: int, heads: int, layers: int, key: Key[Array, ""]):
        size, small, inner = features // heads, features**-0.5, 4 * features
        residual = (2 * layers) ** -0.5  # so that the sum over layers begins at scale 1
        shapes = ((features, 3, heads, size), (heads, size, features), (features, inner), (inner, features))
        qkv, out, up, down = _normals(key, *shapes)
        self.qkv, self.up = small * qkv, small * up
        self.out, self.down = small * residual * out, small / 2 * residual * down

    def __call__(self, x: Hidden) -> Hidden:
        features, *heads = self.qkv.shape
        qkv = _dense(_rms_norm(x), self.qkv.reshape(features, -1)).reshape(*x.shape[:-1], *heads)
        q, k, v = (part.squeeze(-3) for part in jnp.split(qkv, 3, axis=-3))
        q, k = _rotary(q), _rotary(k)
        time = x.shape[-2]
        scores = jnp.einsum("...ths,...uhs->...htu", q, k) * q.shape[-1] ** -0.5
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((time, time), bool)), scores.shape)
        attention = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        mixed = jnp.einsum("...htu,...uhs->...ths", attention, v).reshape(x.shape)
        x = x + _dense(mixed, self.out.reshape(-1, features))
        return x + _dense(_gelu(_dense(_rms_norm(x), self.up)), self.down)


def _rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _rotary(x):
    """Rotates pairs of features [..., T, heads, size] by angles that grow with the position. Su et al. 2021."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = (jnp.arange(x.shape[-3], dtype=x.dtype)[:, None] * rate[None, :])[:, None, :]
    cos, sin = (jnp.broadcast_to(f(angle), (*x.shape[:-1], half)) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Transformer(eqx.Module):
    """A small causal transformer with rotary positions; 459 k parameters at vocab 256.

    >>> eqx.filter_jit(Transformer(256, key=jax.random.key(0)).hidden)(jnp.array([[3, 1]])).shape
    (1, 2, 128)
    """

    embedding: Float[Array, "vocab features"]
    blocks: tuple[Block, ...]
    weight: Float[Array, "features vocab"]

    def __init__(self, vocab: int, *, features: int = 128, layers: int = 2, heads: int = 4, key: Key[Array, ""]):
        if features % (2 * heads):
            raise LabError(f"a transformer's features are a multiple of 2 * heads; got {features} and {heads} heads.")
        first, *keys = jax.random.split(key, layers + 1)
        self.embedding, weight = _normals(first, (vocab, features), (features, vocab))
        self.blocks = tuple(Block(features, heads, layers, k) for k in keys)
        self.weight = HEAD_SCALE * weight

    def hidden(self, tokens: Tokens) -> Hidden:
        """Features of all tokens up to each position: [..., T] -> [..., T, D]."""
        x = self.embedding[tokens]
        for block in self.blocks:
            x = block(x)
        return _rms_norm(x)


MODELS: dict[str, Callable[..., Any]] = {"bigram": Bigram, "mlp": MLP, "transformer": Transformer}
ModelMaker = Callable[[int, Any], Any]


def logits(model: Any, tokens: Tokens) -> Logits:
    """hidden @ weight: the prediction of the token after each position, [..., T] -> [..., T, V]."""
    return model.hidden(tokens) @ model.weight


def resolve_model(model: str | ModelMaker) -> ModelMaker:
    """A function (vocab, key) -> model by name, `"mlp(context=4)"`, `"./mine.py:Net(width=8)"`, or such a function itself.

    One whose key goes by its name, as in equinox's modules, is taken as well. Raises `LabError` for an unknown name or option,
    an option's value that no model of that kind has, and a file that does not import.

    >>> resolve_model("bigram(features=4)")(10, jax.random.key(0)).weight.shape
    (4, 10)
    """
    if callable(model):
        return _keyed(model)
    if not isinstance(model, str):
        raise LabError(
            f"a model is a name, one of {', '.join(MODELS)}, or a function (vocab, key) -> model; got {type(model).__name__}."
        )
    make, options = from_table(model, "model", MODELS)
    whole = with_settings(make, options, _given(make), "option")
    for key, value in options.items() if make in MODELS.values() else ():
        least = 0 if key == "layers" else 1
        if (type(value) is not int or value < least) and value is not inspect.signature(make).parameters[key].default:
            raise LabError(f"{parse_call(model)[0]}'s {key} is a whole number from {least} on; got {value!r}.")
    return _keyed(whole)


def _given(make: Callable) -> list[str]:
    """Which of a function's parameters are the vocabulary and the key: the first, and the one of that name or the second."""
    names = list(inspect.signature(make).parameters)
    return [names[0], "key"] if "key" in names else names[:2]


def _keyed(make: Callable) -> ModelMaker:
    try:
        key = inspect.signature(make).parameters.get("key")
    except (TypeError, ValueError):  # compiled code may have no signature
        key = None
    by_name = key is not None and key.kind is inspect.Parameter.KEYWORD_ONLY
    return (lambda vocab, key: make(vocab, key=key)) if by_name else make


def model_shapes(make: ModelMaker, vocab: int) -> Any:
    """The model that a function makes, by shapes alone, and checked. Raises `LabError`."""
    try:
        model, again = (eqx.filter_eval_shape(make, vocab, jax.random.key(0)) for _ in range(2))
    except LabError:
        raise
    except FAILURES as error:
        raise LabError(
            f"the model's function fails: {in_short(error)}. It is called with (vocab, key), in this order: a "
            "whole number and a key of jax.random; and JAX traces it."
        ) from error
    if jax.tree.structure(model) != jax.tree.structure(again):
        raise LabError(
            "the model's function makes another kind of model at every call. Is a class or a lambda made inside it? Make it "
            "once, beside the function."
        )
    return checked_model(model, vocab)


def checked_model(model: Any, vocab: int) -> Any:
    """The model itself, or one of shapes, once its two members have been seen to fit. Raises `LabError`."""
    # By name: a property, a tied embedding's transpose say, can be read of arrays only.
    if not callable(getattr(model, "hidden", None)) or "weight" not in dir(model):
        raise LabError(f"{type(model).__name__} needs .hidden(tokens [..., T]) -> [..., T, D] and .weight [D, V].")
    if isinstance(model, eqx.Module) and not jax.tree.leaves(model):
        raise LabError(f"{type(model).__name__} has no parameter: no field of it is an array that training could move.")
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(model)):
        raise LabError(
            f"{type(model).__name__} is no pytree, so JAX finds no parameter in it. Make it one: an equinox.Module, say, or "
            "by jax.tree_util.register_dataclass."
        )
    read = lambda model, tokens: (model.hidden(tokens), model.weight)
    try:
        hidden, weight = eqx.filter_eval_shape(read, model, jax.ShapeDtypeStruct((2, 3), jnp.int32))
    except FAILURES as error:
        raise LabError(
            f"{type(model).__name__}'s hidden fails on tokens [2, 3]: {in_short(error)}. It takes sequences in "
            "batches of any shape, [..., T]; jax.vmap makes that of one that takes a single sequence."
        ) from error
    if hidden.ndim != 3 or weight.shape != (hidden.shape[-1], vocab) or hidden.shape[:2] != (2, 3):
        raise LabError(
            f"{type(model).__name__}: tokens [2, 3] gave hidden {list(hidden.shape)} beside a weight "
            f"{list(weight.shape)}; they should be [2, 3, D] and [D, {vocab}]."
        )
    return model


def check_causal(make: ModelMaker, vocab: int, window: int) -> None:
    """Raises `LabError` for a model whose hidden states depend on tokens that come later, which are those to be predicted.

    Asked of windows as long as those of training: of the model as it is made, and of one whose parameters are all moved, for
    what begins at 0 may open a way that training finds.
    """
    ends = jnp.zeros((2, window), jnp.int32).at[1, -1].set(vocab - 1)

    @eqx.filter_jit
    def hidden(key, much):
        moved = lambda leaf: leaf + (much * jnp.sin(1 + jnp.arange(leaf.size))).reshape(leaf.shape).astype(leaf.dtype)
        parameters, rest = eqx.partition(make(vocab, key), eqx.is_inexact_array)
        return eqx.combine(jax.tree.map(moved, parameters), rest).hidden(ends)

    both = [np.asarray(hidden(jax.random.key(0), jnp.float32(much))[:, :-1], np.float64) for much in (0, 0.1)]
    one, other = np.concatenate(both, axis=1)
    if not np.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise LabError(
            "the model reads the future: its hidden states before the last token change with that token. Position i may read "
            "tokens 0..i alone, for it predicts token i + 1."
        )
