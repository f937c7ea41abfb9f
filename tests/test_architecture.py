"""The house: imports point one way, heavy ones wait, files stay short, what is public says what it is."""

import ast
import pathlib

import pytest

import xentlab

PACKAGE = pathlib.Path(xentlab.__file__).parent
# Each module may import those to its left, on its own shelf or a lower one; the losses' files count as one.
SHELVES = (
    {"contract", "memory", "products", "adam", "defaults"},
    {"checks", "names", "targets", "mesh"},
    {"losses"},
    {"catalogue", "information", "hosts"},
    {
        "sources",
        "models",
        "gradients",
        "metrics",
        "reading",
        "linear",
        "recipe",
        "fit",
        "layout",
        "checkpoints",
        "cache",
    },
    {"program"},
    {"training", "coding", "audit"},
    {"examine"},
    {"results"},
    {"race"},
    {"stages"},
    {"runs", "console"},
    {"compare"},
    {"charts", "scoreboard", "markup", "resume"},
    {"pages"},
    {"report", "tour", "commands"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, shelf in enumerate(SHELVES) for name in shelf}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path, top_only=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_shelf():
    assert {module_of(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = module_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "xentlab" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != here:
            assert LEVEL[parts[1]] < LEVEL[here], f"{here} imports {parts[1]}"
        assert parts[0] not in ("experiments", "tests")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_wait_until_they_are_used(path):
    allowed = {"charts": {"altair"}, "cli": {"tyro"}, "commands": {"tyro"}}.get(module_of(path), set())
    heavy = {name.split(".")[0] for name in imports(path, top_only=True)} & {"altair", "pandas", "orbax", "tyro", "vl_convert"}
    assert heavy <= allowed


def test_charts_know_no_loss():
    """A chart's code names none: losses come in as data."""
    words = {node.value for node in ast.walk(ast.parse((PACKAGE / "charts.py").read_text())) if isinstance(node, ast.Constant)}
    assert not words & set(xentlab.LOSSES)


def test_files_stay_readable():
    for path in [*MODULES, *(PACKAGE.parent / "tests").glob("*.py"), *(PACKAGE.parent / "experiments").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path


def test_public_functions_have_docstrings():
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
