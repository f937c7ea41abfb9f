"""The README's code runs as it stands, its commands exist, and its links lead somewhere."""

import pathlib
import re
import shlex

import pytest

from xentlab.cli import main

TRAINS = True
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
def test_commands_in_the_text_are_understood(line, capsys):
    """Parsed with --help at their end, so that nothing runs but a wrong name would be seen."""
    words = shlex.split(line)[1:]
    if words[0] == "COMMAND":
        return
    with pytest.raises(SystemExit) as end:
        main([*words[:1], "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith("--") and word != "--help")


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README + (ROOT / "experiments" / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_files_that_the_text_names_exist():
    section = README.split("## What is where")[1]
    for name in re.findall(r"`([\w/]+\.py)`", section):
        assert (ROOT / name).exists() or (ROOT / "xentlab" / name).exists(), name
