"""The README's code runs as it stands, its commands exist, and its links lead somewhere."""

import dataclasses
import json
import pathlib
import re
import shlex

import pytest
from scripts import documents

from xentlab import resolve
from xentlab.cli import _parse, main
from xentlab.mesh import parse_mesh
from xentlab.names import is_own

TRAINS = True
COMPILED_WELL = True
ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_there_are_two_shell_commands_and_each_makes_its_environment():
    commands = blocks("sh")
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ") for command in commands)
    assert commands[0].strip().endswith("xentlab report")
    assert commands[1].strip().endswith("pytest")


def test_the_library_example_runs(capsys):
    example = blocks("python")[0]
    exec(compile(example, "README", "exec"), {})
    out = capsys.readouterr().out
    assert all(word in out for word in ("dvalue_dlogit", "share_of_gradient", "test_nll"))


def test_the_own_loss_example_runs(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(blocks("python")[1])
    lines = [line for line in "\n".join(blocks("")).splitlines() if line.startswith("xentlab gradients")]
    assert lines
    for line in lines:
        main(shlex.split(line)[1:])
        assert "cubic(power=2)" in capsys.readouterr().out


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`(xentlab [a-z][^`]*)`", README))))
def test_commands_in_the_text_are_understood(line):
    """Parsed whole, so that nothing runs but a wrong option, value or name of a loss would be seen."""
    words = shlex.split(line)[1:]
    if words[0] == "COMMAND":
        return
    if len(words) == 1:  # the command as such, which may ask for more
        with pytest.raises(SystemExit) as end:
            main([*dict.fromkeys([*words, "--help"])])
        assert end.value.code == 0
        return
    command = _parse(words)
    for name in (*getattr(command, "losses", ()), *filter(None, [getattr(command, "loss", None)])):
        assert is_own(name) or resolve(name)
    assert parse_mesh(getattr(command, "mesh", None)) is not None


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README + (ROOT / "experiments" / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_files_that_the_text_names_exist():
    section = README.split("## What is where")[1]
    for name in re.findall(r"`([\w/]+\.py)`", section):
        assert (ROOT / name).exists() or (ROOT / "xentlab" / name).exists(), name


def test_every_module_has_its_place_in_the_text():
    section = README.split("## What is where")[1]
    for path in (ROOT / "xentlab").iterdir():
        name = f"{path.name}/" if (path / "__init__.py").exists() else path.name
        if name.endswith((".py", "/")) and not name.startswith("_"):
            assert f"{name}`" in section, name


def test_the_documents_say_what_the_last_results_say():
    write = documents()
    results, benchmarks = json.loads(write.RESULTS.read_text()), write.read_benchmarks()
    audited = re.search(r"<!-- begin audit -->\n(.*?)\n<!-- end audit -->", README, re.DOTALL)[1]
    reported = json.loads(write.REPORTED.read_text())
    for path, text in write.documents(results, benchmarks, reported, audited).items():
        assert path.read_text() == text, f"{path.name} differs from the results in docs/: run docs/write.py"


def test_every_experiment_is_in_the_index():
    index = (ROOT / "experiments" / "README.md").read_text()
    for path in (ROOT / "experiments").glob("*.py"):
        assert f"`python experiments/{path.name}`" in index


def test_the_shown_audit_is_what_the_audit_says():
    assert documents().own_loss(README) in README


def test_the_bits_of_the_four_doors_are_measured_again():
    """By a race anew, within the interval that the results keep; the other doors are test_experiments.py's."""
    from xentlab.sources import Text
    from xentlab.stages import run_stage, standard_stages

    rows = {row["loss"]: row for row in json.loads(documents().RESULTS.read_text())["four_doors"]}
    stage = standard_stages(Text())[0]
    stage = dataclasses.replace(stage, learning_rates=(rows["nll"]["best_rate"],))
    bits = run_stage(stage, ["nll"]).race.table.bits_per_byte[0]
    # Another Python brings another text: twice the interval, and no less than 3%.
    low, high = rows["nll"]["bits_per_byte_low"], rows["nll"]["bits_per_byte_high"]
    assert bits == pytest.approx((low + high) / 2, abs=max(high - low, 0.03 * high))
    assert rows["nll"]["bits_per_byte"] < min(row["bits_per_byte"] for name, row in rows.items() if name != "nll")
