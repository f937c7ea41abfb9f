"""What a loss is: a plain function, and the facts attached to it.

A loss takes logits [..., V] and integer targets [...] and returns one value a token [...], unreduced, in nats where it
has a unit. Its hyperparameters are keywords with defaults. That is optax's signature too, so optax's losses are losses.
"""

import dataclasses
import functools
import hashlib
import inspect
import operator
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

AnyArray = Array | np.ndarray
Logits = Float[AnyArray, "*tokens vocab"]
Targets = Integer[AnyArray, "*tokens"]
PerToken = Float[Array, "*tokens"]
Setting = float | Float[AnyArray, ""]  # of a loss; one that is learned, JAX traces
Loss = Callable[..., Any]
# A limit is a number, or a function of the vocabulary's size and the loss's settings.
Limit = float | Callable[..., float]
FAILURES = (Exception, SystemExit)  # of a user's own code: one that calls sys.exit would end the command without a word


class LabError(ValueError):
    """A mistake in what the user gave. The command line prints it as one line and exits with code 2."""


def in_short(error: BaseException) -> str:
    """What an error is, the first line of what it says, and where in a user's own file, as a part of a sentence.

    >>> in_short(ValueError("no such shape.\\nAnd much more."))
    'ValueError: no such shape'
    """
    first = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}{_where(error)}"


def _where(error: BaseException) -> str:
    """The innermost line that an error came by in a file that is nobody's package, " (mine.py:3, in helper)", or nothing."""
    lines = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    packages = (os.path.dirname(__file__), *places)
    for file, line, function in reversed(lines):
        if os.path.isfile(file) and not os.path.abspath(file).startswith(packages):
            return f" ({os.path.basename(file)}:{line}, in {function})"
    return ""


def softmax_link(logits: Logits) -> Logits:
    """The softmax, the link of a loss that names no other: logits [..., V] -> probabilities [..., V]."""
    return jax.nn.softmax(logits)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the literature says of a loss. Tests check every fact; `None` means that nobody has said.

    - `source`: where it comes from; `formula` and `gradient` (with respect to the logits) in LaTeX.
    - `link`: logits -> distribution, with the loss's settings as keywords; `link_name` says it in words.
    - `proper`: "softmax" if the expected loss is minimised by softmax = P alone, "link" if so through `link`, else "no".
    - `calibrated`: the argmax of the minimiser is the argmax of P. `convex`: in the logits. `bounded`: sup L < infinity.
    - `shift`: L(z + c) = L(z). `local`: L depends on z through p_y alone.
    - `low_p_even`, `low_p_one`: the limit of |dL/dz_y| as p_y -> 0, where z_y falls with the rest equal, and where one
      rival rises from z = 0. Numbers, or functions of `vocab` and the settings.
    - `stops_gradient`: something in it is held constant, so that its gradient is a field and not its value's slope.
    - `infinite`: where infinity is the right value in float32: "large gaps", "-inf rival", both, or nowhere.
    - `settings`: keyword settings that the laws are tested at.
    - `stream`: the same loss as a function of reductions of the logits, which its parameters name (`linear/reductions.py`):
      with it, `linear_loss` need never hold a row of logits. The loss's settings come as keywords.
    """

    source: str = ""
    formula: str = ""
    gradient: str = ""
    link: Callable[..., Any] = softmax_link
    link_name: str = "softmax(z)"
    proper: Literal["softmax", "link", "no"] | None = None
    calibrated: bool | None = None
    convex: bool | None = None
    bounded: bool | None = None
    shift: bool | None = None
    local: bool | None = None
    low_p_even: Limit | None = None
    low_p_one: Limit | None = None
    stops_gradient: bool = False
    infinite: tuple[Literal["large gaps", "-inf rival"], ...] = ()
    settings: tuple[Mapping[str, Any], ...] = ({},)
    stream: Callable[..., Any] | None = None
    note: str = ""

    def __post_init__(self):
        for names, allowed, kind in _KINDS:
            for name in names:
                if not allowed(value := getattr(self, name)):
                    raise LabError(f"a loss's {name} is {kind}; got {value!r}.")


_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("source", "formula", "gradient", "link_name", "note"), lambda value: isinstance(value, str), "a text"),
    (("link",), callable, "a function, logits [..., V] -> probabilities [..., V]"),
    (("stream",), lambda value: value is None or callable(value), "a function of reductions of the logits"),
    (("proper",), lambda value: value in ("softmax", "link", "no", None), "softmax, link, no, or None where nobody has said"),
    (
        ("calibrated", "convex", "bounded", "shift", "local"),
        lambda value: value in (True, False, None),
        "True, False, or None where nobody has said",
    ),
    (
        ("low_p_even", "low_p_one"),
        lambda value: value is None or callable(value) or hasattr(value, "__float__"),
        "a number, or a function of vocab and the settings",
    ),
    (("stops_gradient",), lambda value: value in (True, False), "True or False"),
    (
        ("infinite",),
        lambda value: not isinstance(value, str) and set(value) <= {"large gaps", "-inf rival"},
        'a tuple of "large gaps" and "-inf rival"',
    ),
    (
        ("settings",),
        lambda value: isinstance(value, tuple | list) and all(isinstance(each, Mapping) for each in value),
        "a tuple of dictionaries, keywords of the loss",
    ),
)


def loss(**facts: Any) -> Callable[[Loss], Loss]:
    """Attaches `Facts` to a loss, given by the names of its fields, and hands back the same function.

    A race reads the model through `link`, which gives probabilities, and not their logarithms; without one, by a softmax.
    Raises `LabError` for a fact that is none, and for a function that takes no attributes.

    >>> @loss(source="a notebook, 1999", formula="1 - p_y")
    ... def miss(logits, targets):
    ...     return 1 - at_target(jax.nn.softmax(logits), targets)
    >>> facts_of(miss).source
    'a notebook, 1999'
    """

    known = [field.name for field in dataclasses.fields(Facts)]
    if unknown := [name for name in facts if name not in known]:
        raise LabError(f"no fact is called {unknown[0]!r}; the facts: {', '.join(known)}.")
    if "link" in facts and "link_name" not in facts:
        called = getattr(facts["link"], "__name__", "")
        facts["link_name"] = "a link of its own" + f", {called}" * called.isidentifier()
    made = Facts(**facts)

    def attach(function: Loss) -> Loss:
        try:
            function.facts = dataclasses.replace(made)  # its own: what a wrapper has copied is told by identity
        except AttributeError as error:  # a frozen record's too
            raise LabError(f"{type(function).__name__} takes no facts; give them to a function that calls it.") from error
        return function

    return attach


def layers(loss: Loss) -> list[Loss]:
    """A loss and what is within it, from each `functools.partial` to the function under all of them."""
    if not callable(loss):
        got = f"{loss!r}. It is what resolve({loss!r}) makes of a name" if isinstance(loss, str) else type(loss).__name__
        raise LabError(f"a loss is a function of (logits, targets); got {got}.")
    found = [loss]
    while isinstance(found[-1], functools.partial):
        found.append(found[-1].func)
    return found


def unwrapped(loss: Loss) -> tuple[Loss, tuple[Any, ...], dict[str, Any]]:
    """The function under any `functools.partial`, and the settings that the partials hold: by place, and by keyword."""
    *partials, function = layers(loss)
    return function, *_bound(partials)


def _bound(partials: Iterable[functools.partial]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What partials hold, by place and by keyword, the outermost first."""
    places: tuple[Any, ...] = ()
    settings: dict[str, Any] = {}
    for each in partials:
        places, settings = each.args + places, each.keywords | settings
    return places, settings


def facts_of(loss: Loss) -> Facts:
    """The facts of a loss, or empty ones.

    A function around a loss may be another loss: what `functools.wraps` copied is not true of it. Compiled it is the same one.
    """
    *partials, function = layers(loss)
    function = next((each for each in partials if "facts" in vars(each)), function)  # a partial may have facts of its own
    facts = getattr(function, "facts", Facts())
    inherited = facts is getattr(getattr(function, "__wrapped__", None), "facts", None)
    if not inherited:
        return facts
    return facts_of(function.__wrapped__) if isinstance(function, jax.stages.Wrapped) else Facts()


def settings_of(loss: Loss) -> dict[str, Any]:
    """The settings that a `functools.partial` of a loss holds, each by its name."""
    function, places, settings = unwrapped(loss)
    names = inspect.signature(function).parameters if places else ()
    return dict(zip(names, places, strict=False)) | settings


def settings_and_defaults(loss: Loss) -> dict[str, Any]:
    """All settings of a loss by name: those that it was given, and the defaults of the others."""
    *_, function = layers(loss)
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty} | settings_of(loss)


def name_of(loss: Loss) -> str:
    """The name of a loss as a user would write it.

    >>> def focal(logits, targets, *, gamma=2.0): ...
    >>> name_of(focal), name_of(functools.partial(focal, gamma=1)), name_of(named(focal, "mine"))
    ('focal', 'focal(gamma=1)', 'mine')
    """
    found = layers(loss)
    place = next((i for i, each in enumerate(found) if "__name__" in getattr(each, "__dict__", ())), len(found) - 1)
    name = getattr(found[place], "__name__", type(found[place]).__name__)
    places, settings = _bound(found[:place])
    inside = ", ".join([*map(_shown, places), *(f"{key}={_shown(value)}" for key, value in settings.items())])
    return f"{name}({inside})" if inside else name


def named(loss: Loss, name: str) -> Loss:
    """The same loss under another name, as a partial that knows it."""
    again = functools.partial(loss)
    again.__name__ = name
    return again


def _shown(setting: Any) -> str:
    """A setting as it is written; of an array its shape, and a hash by which another one has another name."""
    if not hasattr(setting, "shape") or isinstance(setting, jax.core.Tracer):
        return repr(setting)
    values = np.asarray(setting)
    if not values.shape:
        return str(values)
    return f"{values.dtype}{list(values.shape)}#{hashlib.sha256(values.tobytes()).hexdigest()[:8]}"


def link_of(loss: Loss) -> Callable[[Logits], Logits]:
    """The link of a loss, logits [..., V] -> probabilities [..., V], with the loss's settings and defaults that it knows.

    >>> @loss(link=lambda logits, *, t=1.0: jax.nn.softmax(logits / t))
    ... def heated(logits, targets, *, t=4.0): ...
    >>> print("{:.4f} {:.4f}".format(*link_of(heated)(jnp.array([4.0, 0.0]))))  # e / (1 + e)
    0.7311 0.2689
    """
    link = facts_of(loss).link
    if link is softmax_link:
        return link
    parameters = list(inspect.signature(link).parameters.values())[1:]  # the first are the logits
    own = {each.name: each.default for each in parameters}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    # What the link has as its own default is left to it: what is compiled of a link goes by its identity.
    alike = lambda key, value: own.get(key) is value or (isinstance(value, float | int | str) and own.get(key) == value)
    given = {key: value for key, value in settings_and_defaults(loss).items() if key in own or takes_all}
    bound = {key: value for key, value in given.items() if not alike(key, value)}
    return functools.partial(link, **bound) if bound else link


def low_p_claim(loss: Loss, rivals: Literal["even", "one"], vocab: int) -> float | None:
    """The claimed limit of |dL/dz_y| as p_y -> 0 on a path, at a vocabulary and the loss's own settings; None if no one claims.

    Raises `LabError` where a claim that is a function fails.

    >>> @loss(low_p_even=lambda vocab, *, scale=1.0: scale * (vocab - 1))
    ... def many(logits, targets, *, scale=1.0): ...
    >>> low_p_claim(functools.partial(many, scale=2.0), "even", 4)
    6.0
    """
    claim = getattr(facts_of(loss), f"low_p_{rivals}")
    if not callable(claim):
        return claim
    try:
        known = inspect.signature(claim).parameters
        return claim(vocab, **{key: value for key, value in settings_of(loss).items() if key in known})
    except FAILURES as error:
        raise LabError(
            f"{name_of(loss)}'s low_p_{rivals} fails at a vocabulary of {vocab}: {type(error).__name__}: {error}. It is a "
            "number, or a function of vocab and of settings that have the loss's defaults."
        ) from error


def is_known(setting: Any) -> bool:
    """Whether a loss's setting is a number that can be judged: one that is traced cannot be, and is taken as it is."""
    return not isinstance(setting, jax.core.Tracer)


def check_setting(setting: Any, allowed: Callable[[np.ndarray], Any], message: str) -> None:
    """Raises `LabError` for a known setting that a loss does not allow.

    By NumPy: a JAX array that is known is none any more once JAX compares it within a trace.

    >>> check_setting(jnp.float32(2), lambda alpha: alpha > 1, "alpha is above 1")
    """
    if not is_known(setting):
        return
    number = np.asarray(setting)
    if number.shape or (number.dtype.kind not in "fiu" and not jnp.issubdtype(number.dtype, jnp.floating)):
        raise LabError(f"{message} A setting is one number.")
    if not (np.isfinite(float(number)) and allowed(number)):
        raise LabError(message)


def whole(number: Any, least: int, message: str) -> int:
    """A whole number, of NumPy's or JAX's too, as Python's own. Raises `LabError` for another one, and below the least.

    >>> whole(np.int64(3), 1, "so many as 3")
    3
    """
    try:
        value = operator.index(number)
    except TypeError:
        value = None
    if value is None or value < least or isinstance(number, bool):
        raise LabError(message)
    return value


def value_and_gradient(loss: Loss, logits: Logits, targets: Targets) -> tuple[PerToken, Logits]:
    """Each token's loss [...] and its gradient by that token's logits [..., V]: one pass for both.

    >>> from xentlab import at_target
    >>> square = lambda logits, targets: at_target(logits, targets) ** 2
    >>> value_and_gradient(square, jnp.array([3.0, 1.0]), jnp.array(0))
    (Array(9., dtype=float32), Array([6., 0.], dtype=float32))
    """
    value, back = jax.vjp(lambda logits: loss(logits, targets), logits)
    return value, back(jnp.ones_like(value))[0]
