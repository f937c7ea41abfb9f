"""What the command makes of what a shell gives it, and of streams that know few characters."""

import json
import os
import subprocess
import sys

import pytest

from xentlab.cli import main


@pytest.mark.parametrize("given", [["--out", ""], ["--out="], ["--losses", ""]])
def test_a_shells_unset_variable_is_told(given, capsys):
    with pytest.raises(SystemExit) as end:
        main(["gradients", "--quick", "--losses", "nll", *given])
    assert end.value.code == 2
    assert "is a shell's variable unset?" in capsys.readouterr().err


def test_a_narrow_stream_gets_plain_characters_and_no_other_verdict():
    said = subprocess.run(
        [sys.executable, "-c", "from xentlab.cli import _open_closed; _open_closed(); print('– ∞ ± ⇥ −1 ä')"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "- inf +- ->| -1 ?\n"


def test_a_record_has_the_probabilities_that_were_asked(tmp_path, capsys):
    main(["gradients", "--quick", "--losses", "nll", "--out", str(tmp_path / "run"), "--format", "json"])
    asked = {row["p"] for row in json.loads(capsys.readouterr().out)}
    assert asked == set(json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["probabilities"])
