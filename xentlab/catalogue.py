"""The losses by name: those of this package, those of installed packages, and those in a user's own file.

A loss enters the catalogue by standing in a file of `xentlab.losses` under `@loss`: nothing else lists it.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import xentlab.losses
from xentlab.checks import check_alone, check_gradient, checked
from xentlab.contract import (
    FAILURES,
    Facts,
    LabError,
    Loss,
    facts_of,
    layers,
    link_of,
    name_of,
    named,
    settings_of,
    unwrapped,
)
from xentlab.names import file_of, is_own, near_names, own, parse_call, with_settings

ENTRY_POINTS = "xentlab.losses"
# What others call a loss whose name here is not near to it, in letters alone.
ELSEWHERE = {"crossentropy": "nll", "softmaxcrossentropy": "nll", "logloss": "nll", "negativeloglikelihood": "nll", "ce": "nll"}


def _scan(package: ModuleType) -> dict[str, Loss]:
    found = {}
    for module_info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for name, value in vars(module).items():
            if isinstance(getattr(value, "facts", None), Facts) and value.__module__ == module.__name__:
                found[name] = value
    return found


LOSSES: Mapping[str, Loss] = MappingProxyType(_scan(xentlab.losses))
"""Every loss of the package by its function's name, read-only."""


def installed_losses() -> dict[str, importlib.metadata.EntryPoint]:
    """The losses that installed packages offer under the entry point group `xentlab.losses`, not imported yet."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def resolve(loss: str | Loss, check: bool = True, vocab: int = 5) -> Loss:
    """The loss that a name or a callable stands for.

    - `"focal"`, `"focal(gamma=1)"`: of this package, or of an installed one's entry point;
    - `"./mine.py:my_loss"`: a function in a file; `"package.module:my_loss"`: in an importable module;
    - a callable is checked and handed back.

    Raises `LabError` for an unknown name (listing the near ones), a file that does not import, a missing function,
    an unknown setting, and, unless `check` is False, a function that does not return each token's own value at this vocabulary,
    which a loss may know: by class weights, say.

    >>> name_of(resolve("focal(gamma=1)"))
    'focal(gamma=1)'
    """
    if not callable(loss) and not isinstance(loss, str):
        raise LabError(f"a loss is a name, 'nll' say, or a function of (logits, targets); got {type(loss).__name__}.")
    function = hashable(loss) if callable(loss) else _named(loss)
    if check and not is_catalogued(checked(function, vocab)):
        check_gradient(function, vocab)
        check_alone(function, vocab)
    return function


def hashable(loss: Loss) -> Loss:
    """The loss; of an object of arrays, which has no hash, a partial: what is compiled is kept by its function."""
    try:
        hash(loss)
    except TypeError:
        return functools.partial(loss)
    return loss


def _named(loss: str) -> Loss:
    if is_own(loss):
        function, settings = own(loss, "loss")
        if settings and isinstance(function, type):
            name = name_of(function)
            raise LabError(f"{name} is a class: make the loss in the file, {name.lower()} = {name}(...), and name that.")
        return with_settings(function, settings)
    name, settings = parse_call(loss)
    if name in LOSSES:
        return with_settings(LOSSES[name], settings)
    installed = installed_losses()
    if name in installed:
        try:
            function = installed[name].load()
        except FAILURES as error:
            raise LabError(
                f"the installed loss {name} ({installed[name].value}) fails to import: {type(error).__name__}: {error}"
            ) from error
        if not callable(function):
            raise LabError(
                f"the installed loss {name} ({installed[name].value}) is no function; it is {type(function).__name__}."
            )
        return with_settings(function if name_of(function) == name else named(function, name), settings)
    if name.endswith(".py"):
        raise LabError(f"{name} is a file; name the function in it that is the loss, as in {name}:FUNCTION.")
    if len(several := name.replace(",", " ").split()) > 1 and all(each in LOSSES for each in several):
        raise LabError(f"{name!r} is {len(several)} losses in one name; give them apart: {' '.join(several)}.")
    meant = ELSEWHERE.get("".join(filter(str.isalpha, name.lower())), name)
    near = f"did you mean {meant}?" if meant != name else near_names(name, [*LOSSES, *installed])
    raise LabError(f"no loss named {name!r}; {near} A loss of your own: ./file.py:function.")


def resolve_all(losses: Iterable[str | Loss], vocab: int = 5) -> dict[str, Loss]:
    """Losses by the names they are shown under, in order: those of a list, or as a dict has them.

    Raises `LabError` for none, for two of one name, and for another one that is called nll.

    >>> [*resolve_all({"mild": "focal(gamma=1)", "nll": "nll"})]
    ['mild', 'nll']
    """
    if isinstance(losses, Mapping):
        if wrong := [name for name in losses if not isinstance(name, str) or not name]:
            raise LabError(f"a loss's name is a text; got {wrong[0]!r}.")
        known = {name: resolve(loss, check=False) for name, loss in losses.items()}
        losses = [loss if name_of(loss) == name else named(loss, name) for name, loss in known.items()]
    if isinstance(losses, str) or callable(losses):
        losses = [losses]
    if not isinstance(losses, Iterable):
        raise LabError(f"losses are names or functions, a list of them; got {type(losses).__name__}.")
    found: dict[str, Loss] = {}
    for item in losses:
        function = resolve(item, vocab=vocab)
        name = name_of(function)
        if name == "nll" and not (is_catalogued(function) and _within(function) is LOSSES["nll"]):
            raise LabError("nll is cross entropy here, beside which all others are set; give a loss of your own another name.")
        if name in found and not _same(found[name], function):
            raise LabError(
                f"two different losses are called {name!r}; rename one of the functions, or, from Python, give them by names: "
                "{'one': ..., 'other': ...}."
            )
        found[name] = function
    if not found:
        raise LabError("no losses given; name at least one, for example nll.")
    return found


def _same(one: Loss, other: Loss) -> bool:
    """Whether two losses of one name are one: a function, and its settings."""
    settings, others = settings_of(one), settings_of(other)
    return unwrapped(one)[0] is unwrapped(other)[0] and all(np.array_equal(settings[key], others.get(key)) for key in settings)


def is_catalogued(loss: Loss) -> bool:
    """Whether a loss and its facts are the catalogue's, at whatever settings, compiled or not: the tests hold it to them.

    >>> is_catalogued(resolve("focal(gamma=1)")), is_catalogued(lambda logits, targets: ...)
    (True, False)
    """
    function = _within(loss)
    return facts_of(loss) is facts_of(function) and any(function is own for own in LOSSES.values())


def _within(loss: Loss) -> Loss:
    """The function under a loss's settings, and what of it is compiled."""
    *_, function = layers(loss)
    return function.__wrapped__ if isinstance(function, jax.stages.Wrapped) else function


def settled(loss: Loss) -> Loss | None:
    """A loss of the catalogue by which what is compiled of it may be kept; None for another, and where a setting may change.

    One object for all settings that are alike; but with an array of JAX's, the loss itself. One of NumPy's may hold other
    numbers the next time.

    >>> settled(resolve("focal(gamma=1.0)")) is settled(functools.partial(LOSSES["focal"], gamma=1.0))
    True
    >>> settled(functools.partial(LOSSES["focal"], gamma=np.array(1.0)))
    """
    if not is_catalogued(loss):
        return None
    settings = settings_of(loss)
    try:
        return _settled(_within(loss), **settings)
    except TypeError:  # an array has no hash
        return loss if all(isinstance(each, jax.Array | Hashable) for each in settings.values()) else None


@functools.lru_cache(maxsize=256, typed=True)
def _settled(function: Loss, /, **settings: Any) -> Loss:
    return functools.partial(function, **settings)


def own_files(losses: Iterable[str | Loss], vocab: int = 5) -> dict[str, dict[str, str | None]]:
    """Of each loss that is not this package's the file that it stands in, and sha256s of that file and of the loss's program.

    The program is `program_of` it. None for what there is not. Raises `LabError` for a name that `resolve` does not know.

    >>> own_files(["nll"])
    {}
    """
    found = {}
    for loss in losses:
        whole = resolve(loss, check=False)
        function = unwrapped(whole)[0]
        if any(function is own for own in LOSSES.values()):
            continue
        found[loss if isinstance(loss, str) else name_of(loss)] = file_of(function) | {"program": program_of(whole, vocab)}
    return found


def program_of(loss: Loss, vocab: int = 5) -> str | None:
    """A hash of what JAX makes of a loss's value and gradient, and of its link.

    What they call in other files is in it, and what they close over. None where that fails.

    >>> program_of(LOSSES["focal"]) == program_of(functools.partial(LOSSES["focal"], gamma=2.0)) != program_of(LOSSES["nll"])
    True
    """
    logits, targets = jax.ShapeDtypeStruct((2, vocab), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    lowered = lambda function, *given: jax.jit(function).lower(*given).as_text()
    try:
        trained = lowered(jax.value_and_grad(lambda z, y: jnp.sum(loss(z, y))), logits, targets)
        # Models are validated through it.
        program = trained + lowered(link_of(loss), logits)
    except FAILURES:  # an error of its own, which whoever trains by it is told
        return None
    return hashlib.sha256(program.encode()).hexdigest()
