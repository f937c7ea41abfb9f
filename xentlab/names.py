"""A function by name, with settings: of a table, `"adamw(b1=.8)"`, or of one's own, `"./mine.py:cubic(power=2)"`."""

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

from xentlab.contract import FAILURES, LabError, in_short, name_of, named

TAKES = {"loss": "(logits, targets)", "model": "(vocab, key)", "optimizer": "a schedule", "schedule": "the number of steps"}
FUNCTIONS = ("model", "optimizer", "schedule")  # that a race takes by name, besides losses


def parse_call(text: str, what: str = "loss") -> tuple[str, dict[str, Any]]:
    """Splits a name with settings into the name and the settings, which are Python literals.

    >>> parse_call("focal(gamma=1)")
    ('focal', {'gamma': 1})
    >>> parse_call("adamw")
    ('adamw', {})
    """
    name, rest = _opened(text)
    if not rest:
        return name, {}
    try:
        call = ast.parse(f"f{rest}", mode="eval").body
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
            f"cannot read the {what} {text.strip()!r}. Write it as name(setting=1.5), settings by keyword, each once, and text "
            "in quotes: name(kind='mean')."
        ) from None
    return name, settings


def _opened(text: str) -> tuple[str, str]:
    """A name, and its settings with their brackets, or nothing."""
    # A folder's name may have brackets too, and a setting the name of a file.
    name, settings = re.fullmatch(r"(.*?\.py:\w*|[^(]*)(\(.*)?", text.strip(), re.DOTALL).groups()
    return name.strip(), settings or ""


def near_names(name: str, names: Iterable[str]) -> str:
    """A clause for an error message that lists the names near to a wrong one."""
    names = sorted(names)
    near = (
        [each for each in names if each.lower() == name.lower()]
        or difflib.get_close_matches(name, names, n=4, cutoff=0.5)
        or [n for n in names if name and name in n][:4]
    )
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}." if names else "none is there."


def with_settings(
    function: Callable, settings: Mapping[str, Any], given: Collection[str] | int = 2, word: str = "setting"
) -> Callable:
    """The function with keyword settings bound. Raises `LabError` for a keyword that it does not know.

    given: what the lab gives it, by name or as the first so many; the word for what it may be set by.
    """
    if not settings:
        return function
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        given = list(parameters)[:given] if isinstance(given, int) else given
        known = [name for name in parameters if name not in given]
        for key in settings:
            if key not in known:
                allowed = f"its {word}s: {', '.join(known)}" if known else f"it has no {word}s"
                raise LabError(f"{name_of(function)} has no {word} {key!r}; {allowed}.")
    return functools.partial(function, **settings)


def is_own(name: str) -> bool:
    """Whether a name is of one's own function, in a file or in a module: `"./mine.py:cubic(power=2)"`."""
    return ":" in _opened(name)[0]


def own(name: str, what: str) -> tuple[Callable, dict[str, Any]]:
    """The function that a name of one's own stands for, and the settings that it gives; what: of `TAKES`.

    Raises `LabError` for a file or module that does not import, and for what is not there or no function.
    """
    name, settings = parse_call(name, what)
    where, _, function = name.rpartition(":")
    if not where:
        raise LabError(f"{name!r} names no file: a {what} of your own is ./file.py:function, or package.module:function.")
    if _is_path(where):
        module = _module_at(expanded(where), what)
    else:
        try:
            module = importlib.import_module(where)
        except FAILURES as error:
            raise LabError(f"cannot import {where}: {type(error).__name__}: {error}") from error
    return _member(module, function, where, what), settings


def from_table(name: str, what: str, table: Mapping[str, Callable]) -> tuple[Callable, dict[str, Any]]:
    """The function that a name stands for, of one's own or in a table, and the settings that it gives; what: of `TAKES`.

    Raises `LabError` as `own` does, and for a name that the table does not have.
    """
    if is_own(name):
        return own(name, what)
    called, settings = parse_call(name, what)
    if called not in table:
        raise LabError(f"no {what} named {called!r}; {near_names(called, table)} One of your own: ./file.py:function.")
    return table[called], settings


def placed(name: str) -> str:
    """A name as any folder knows it: of one's own in a file by the file's whole path.

    >>> placed("focal(gamma=1)"), placed("/made/./mine.py:cubic(power=2)")
    ('focal(gamma=1)', '/made/mine.py:cubic(power=2)')
    """
    return _with_file(name, lambda path: expanded(path).absolute())


def unplaced(name: str) -> str:
    """A name without the folder that its file lies in, if it has one.

    >>> unplaced("focal(gamma=1)"), unplaced("/made/mine.py:cubic(power=2)")
    ('focal(gamma=1)', 'mine.py:cubic(power=2)')
    """
    return _with_file(name, lambda path: path.name)


def _with_file(name: str, written: Callable[[pathlib.Path], Any]) -> str:
    called, settings = _opened(name)
    where, _, function = called.rpartition(":")
    return f"{written(pathlib.Path(where))}:{function}{settings}" if _is_path(where) else name


def file_of(function: Callable) -> dict[str, str | None]:
    """The file that a function stands in, and its sha256; None where it is built in, typed at a prompt, or gone."""
    code = inspect.unwrap(function)
    try:
        path = pathlib.Path(inspect.getsourcefile(code if inspect.isroutine(code) or inspect.isclass(code) else type(code)))
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except (TypeError, OSError):
        return {"file": None, "sha256": None}


def expanded(path: str | pathlib.Path) -> pathlib.Path:
    """A path, ~ being a user's home. Raises `LabError` where that user has none.

    >>> expanded("made/mine.py").name
    'mine.py'
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise LabError(f"{path}: no home of that user is known here. Write the folder out.") from None


def _is_path(where: str) -> bool:
    """Whether what stands before a function's name is a file, and no module."""
    return where.endswith(".py") or "/" in where


def _module_at(path: pathlib.Path, what: str) -> ModuleType:
    if not path.is_file():
        raise LabError(f"no file {path}. A {what} in a file is named ./file.py:function.")
    if path.suffix != ".py":
        raise LabError(f"{path} is no Python file by its name: give it one that ends in .py.")
    name = f"xentlab_user_{path.stem}_{abs(hash(str(path.resolve()))):x}"
    folder = path.parent.absolute()
    if name in sys.modules and _as_read(sys.modules[name].__xentlab_files__):
        return sys.modules[name]
    _forget_helpers()
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    module.__xentlab_files__ = {path: path.stat().st_mtime_ns}
    sys.modules[name], before = module, set(sys.modules)
    sys.path.insert(0, str(folder))  # what lies beside a script it may import
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[name]
        beside = (
            " A file alone is in no package: import what lies beside it by its name." if "relative import" in str(error) else ""
        )
        raise LabError(f"{path} fails to import: {in_short(error)}.{beside}") from error
    finally:
        sys.path.remove(str(folder))
        helpers = {each: _beside(each, folder) for each in set(sys.modules) - before if "." not in each}
        _HELPERS.update({each: file for each, file in helpers.items() if file})
    module.__xentlab_files__ |= {file: file.stat().st_mtime_ns for file in helpers.values() if file}
    return module


# What users' files have imported from beside themselves: another's helper may have the same name, or this one be edited.
_HELPERS: dict[str, pathlib.Path] = {}


def _beside(module: str, folder: pathlib.Path) -> pathlib.Path | None:
    """The file of a module, or of a package's beginning, if it lies in that very folder."""
    file = getattr(sys.modules[module], "__file__", None)
    places = (folder / f"{module}.py", folder / module / "__init__.py")
    return next((place for place in places if file and pathlib.Path(file).absolute() == place), None)


def _as_read(files: dict[pathlib.Path, int]) -> bool:
    return all(file.is_file() and file.stat().st_mtime_ns == read for file, read in files.items())


def _forget_helpers() -> None:
    for name in _HELPERS:
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]
    _HELPERS.clear()


def _member(module: ModuleType, name: str, where: str, what: str) -> Callable:
    member = getattr(module, name, None)
    if member is None:
        home = lambda value: value if hasattr(value, "__name__") else type(value)  # an object's is its class's
        theirs = lambda value: isinstance(value, functools.partial) or home(value).__module__ == module.__name__
        functions = [key for key, value in vars(module).items() if callable(value) and theirs(value) and key[0] != "_"]
        raise LabError(f"{where} has no function {name!r}; {near_names(name, functions)}")
    if not callable(member):
        raise LabError(f"{where}:{name} is {type(member).__name__}, not a function of {TAKES[what]}.")
    if getattr(member, "__name__", None) == name:
        return member
    # A lambda, a partial, an object: known by the name that it has there, and once, for what is compiled goes by identity.
    return vars(module).setdefault("__xentlab_named__", {}).setdefault(name, named(member, name))
