"""The losses by name: those of this package, those of installed packages, and those in a user's own file.

A loss enters the catalogue by standing in a file of `xentlab.losses` under `@loss`: nothing else lists it.
"""

import ast
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pathlib
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import xentlab.losses
from xentlab.contract import (
    FAILURES,
    Facts,
    LabError,
    Loss,
    checked,
    facts_of,
    layers,
    link_of,
    name_of,
    settings_of,
    unwrapped,
)

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


def parse_call(text: str, what: str = "loss") -> tuple[str, dict[str, Any]]:
    """Splits a name with settings into the name and the settings, which are Python literals.

    >>> parse_call("focal(gamma=1)")
    ('focal', {'gamma': 1})
    >>> parse_call("adamw")
    ('adamw', {})
    """
    text = text.strip()
    opened = text.find("(", text.find(".py:") + 1)  # a folder's name may have brackets too
    if opened < 0:
        return text, {}
    name, rest = text[:opened], text[opened + 1 :]
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if (
            not isinstance(call, ast.Call)
            or not isinstance(call.func, ast.Name)
            or call.args
            or any(keyword.arg is None for keyword in call.keywords)
        ):
            raise ValueError
        settings = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(settings) < len(call.keywords):  # Python's parser takes what its compiler would refuse
            raise ValueError
    except (ValueError, SyntaxError):
        raise LabError(
            f"cannot read the {what} {text!r}. Write it as name(setting=1.5), settings by keyword, each once."
        ) from None
    return name.strip(), settings


def near_names(name: str, names: Iterable[str]) -> str:
    """A clause for an error message that lists the names near to a wrong one."""
    names = sorted(names)
    near = (
        [each for each in names if each.lower() == name.lower()]
        or difflib.get_close_matches(name, names, n=4, cutoff=0.5)
        or [n for n in names if name and name in n][:4]
    )
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."


def with_settings(loss: Loss, settings: Mapping[str, Any]) -> Loss:
    """The loss with keyword settings bound. Raises `LabError` for a keyword that it does not know."""
    if not settings:
        return loss
    parameters = inspect.signature(loss).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        known = [parameter.name for parameter in list(parameters)[2:]]
        for key in settings:
            if key not in known:
                allowed = f"its settings: {', '.join(known)}" if known else "it has no settings"
                raise LabError(f"{name_of(loss)} has no setting {key!r}; {allowed}.")
    return functools.partial(loss, **settings)


def _module_at(path: pathlib.Path) -> ModuleType:
    if not path.is_file():
        raise LabError(f"no file {path}. A loss in a file is named ./file.py:function.")
    name = f"xentlab_user_{path.stem}_{abs(hash(str(path.resolve()))):x}"
    if name in sys.modules and getattr(sys.modules[name], "__xentlab_mtime__", None) == path.stat().st_mtime_ns:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    module.__xentlab_mtime__ = path.stat().st_mtime_ns
    sys.modules[name] = module
    beside = str(path.parent.absolute())
    sys.path.insert(0, beside)  # what lies beside a script it may import
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[name]
        raise LabError(f"{path} fails to import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(beside)
    return module


def _member(module: ModuleType, name: str, where: str) -> Loss:
    member = getattr(module, name, None)
    if member is None:
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise LabError(f"{where} has no function {name!r}; {near_names(name, functions)}")
    if not callable(member):
        raise LabError(f"{where}:{name} is {type(member).__name__}, not a function of (logits, targets).")
    if not isinstance(member, functools.partial) and getattr(member, "__name__", "<lambda>") == "<lambda>":
        with contextlib.suppress(AttributeError):  # of an object that takes none
            member.__name__ = name  # two lambdas of a file are two losses
    return member


def resolve(loss: str | Loss, check: bool = True, vocab: int = 5) -> Loss:
    """The loss that a name or a callable stands for.

    - `"focal"`, `"focal(gamma=1)"`: of this package, or of an installed one's entry point;
    - `"./mine.py:my_loss"`: a function in a file; `"package.module:my_loss"`: in an importable module;
    - a callable is checked and handed back.

    Raises `LabError` for an unknown name (listing the near ones), a file that does not import, a missing function,
    an unknown setting, and, unless `check` is False, a function that does not return one value a token at this vocabulary,
    which a loss may know: by class weights, say.

    >>> name_of(resolve("focal(gamma=1)"))
    'focal(gamma=1)'
    """
    if not callable(loss) and not isinstance(loss, str):
        raise LabError(f"a loss is a name, 'nll' say, or a function of (logits, targets); got {type(loss).__name__}.")
    function = loss if callable(loss) else _named(loss)
    return checked(function, vocab) if check else function


def _named(loss: str) -> Loss:
    name, settings = parse_call(loss)
    if name in LOSSES:
        return with_settings(LOSSES[name], settings)
    if ":" in name:
        where, _, function = name.rpartition(":")
        if _is_path(where):
            module = _module_at(pathlib.Path(where).expanduser())
        else:
            try:
                module = importlib.import_module(where)
            except FAILURES as error:
                raise LabError(f"cannot import {where}: {type(error).__name__}: {error}") from error
        return with_settings(_member(module, function, where), settings)
    installed = installed_losses()
    if name in installed:
        try:
            function = installed[name].load()
        except FAILURES as error:
            raise LabError(
                f"the installed loss {name} ({installed[name].value}) fails to import: {type(error).__name__}: {error}"
            ) from error
        return with_settings(function, settings)
    if name.endswith(".py"):
        raise LabError(f"{name} is a file; name the function in it that is the loss, as in {name}:FUNCTION.")
    meant = ELSEWHERE.get("".join(filter(str.isalpha, name.lower())), name)
    near = f"did you mean {meant}?" if meant != name else near_names(name, [*LOSSES, *installed])
    raise LabError(f"no loss named {name!r}; {near} A loss of your own: ./file.py:function.")


def resolve_all(losses: Iterable[str | Loss], vocab: int = 5) -> dict[str, Loss]:
    """Losses by the names they are shown under, in order. Raises `LabError` for none, and for two of one name."""
    if isinstance(losses, str) or callable(losses):
        losses = [losses]
    if not isinstance(losses, Iterable):
        raise LabError(f"losses are names or functions, a list of them; got {type(losses).__name__}.")
    found: dict[str, Loss] = {}
    for item in losses:
        function = resolve(item, vocab=vocab)
        name = name_of(function)
        if name in found and not _same(found[name], function):
            raise LabError(
                f"two different losses are called {name!r}; rename one of the functions, or, where a function makes both, let "
                "it be their loss, and functools.partial bind its settings."
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
    *_, function = layers(loss)
    function = function.__wrapped__ if isinstance(function, jax.stages.Wrapped) else function
    return facts_of(loss) is facts_of(function) and any(function is own for own in LOSSES.values())


def _is_path(where: str) -> bool:
    """Whether what stands before a function's name is a file, and no module."""
    return where.endswith(".py") or "/" in where


def placed(name: str) -> str:
    """A loss's name as any folder knows it: one in a file by the file's whole path.

    >>> placed("focal(gamma=1)"), placed("/made/./mine.py:cubic(power=2)")
    ('focal(gamma=1)', '/made/mine.py:cubic(power=2)')
    """
    named = parse_call(name)[0]
    where, _, function = named.rpartition(":")
    if not _is_path(where):
        return name
    return f"{pathlib.Path(where).expanduser().absolute()}:{function}{name[len(named) :]}"


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
        code = inspect.unwrap(function)
        try:
            path = pathlib.Path(inspect.getsourcefile(code if inspect.isroutine(code) else type(code)))
            file = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        except (TypeError, OSError):  # built in, typed at a prompt, or gone
            file = {"file": None, "sha256": None}
        found[loss if isinstance(loss, str) else name_of(loss)] = file | {"program": program_of(whole, vocab)}
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
