"""Every experiment at a tiny size, against the numbers it is there to show; and as the script that the README names."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

TRAINS = True
FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("bench_"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_asks_one_question_and_is_listed_and_tested(path):
    text = path.read_text()
    assert text.splitlines()[0].endswith("?")
    assert len(text.splitlines()) < 80
    assert f"`python experiments/{path.name}`" in (FOLDER / "README.md").read_text()
    assert f'load("{path.stem}")' in pathlib.Path(__file__).read_text()


def test_low_probability():
    frame = load("low_probability").run(["nll", "brier", "mse_logits"], points=9)
    low = frame[frame.p < 1e-11].set_index(["loss", "rivals"])
    assert low.times_nll["nll", "even"] == 1
    assert low.times_nll["brier", "even"] < 1e-10
    assert low.times_nll["mse_logits", "even"] > 40
    assert low.times_nll["mse_logits", "one"] == pytest.approx(2)
    assert (low.dvalue_dp["nll"] * low.p["nll"]).tolist() == pytest.approx([-1, -1])


def test_one_mountain():
    frame = load("one_mountain").run(tokens=16, vocab=7, steps=400)
    assert len(frame) >= 10
    assert (frame.difference < 1e-5).all()
    assert frame.difference[:-2].max() < 1e-6
    if os.environ.get("CI"):
        assert "torch cross_entropy" in set(frame.what), "CI installs the extra bench"


def test_underflow():
    experiment = load("underflow")
    cliffs = experiment.run().set_index("dtype")
    assert cliffs.numpy_first_zero.to_dict() == {"float16": 8, "bfloat16": 41, "float32": 46, "float64": 324}
    assert cliffs.jax_first_zero["float32"] == 38
    gaps = experiment.gaps().set_index(["form", "gap"])
    assert np.isinf(gaps.value["naive", 100])
    assert np.isnan(gaps.gradient["naive", 100])
    assert (gaps.value["fused", 100], gaps.gradient["fused", 100]) == (100, -1)
    assert experiment.products(longest=100).sum_of_logs.iloc[-1] == pytest.approx(-230.2585, abs=1e-3)
    assert list(experiment.returns().values()) == pytest.approx([1.14072, 0.13166, 0.14], abs=1e-5)


def test_new_loss():
    found = load("new_loss").run(steps=20, seeds=2, rates=(0.1,))
    assert all({"nll", "cubic"} == set(frame.loss) for frame in found.values())
    cubic = found["profile"].set_index(["loss", "p"]).loc["cubic"]
    assert cubic.dvalue_dp[0.5] == pytest.approx(-3 * 0.5**2)


def test_sample_efficiency():
    experiment = load("sample_efficiency")
    frame = experiment.run(["nll", "brier", "focal"], scales=(0.7,), draws=(0,), replicates=2).set_index("loss")
    assert frame.tokens_needed["nll"] == pytest.approx(1)
    assert 1.58 < frame.tokens_needed["brier"] < 1.74
    assert frame.simulated.notna().tolist() == [True, True, False]
    assert frame.bias["focal"] > 1e-3
    assert experiment.picture(frame.reset_index()).to_dict()["layer"]


def test_wrong_start():
    """Linear for nll, exponential for brier: the growth of log(time) a unit of margin goes to 0, and to 1."""
    experiment = load("wrong_start")
    flow = experiment.flow(["nll", "brier"], margins=(8, 9, 10, 11, 12)).set_index(["loss", "margin"])
    assert np.diff(flow.time["nll"]) == pytest.approx([1] * 4, abs=0.001)
    assert flow.exponent["brier", 12] == pytest.approx(1, abs=0.01)
    steps = experiment.run(["nll", "brier"], steps=500).set_index("loss").steps
    assert steps["nll"] < 50
    assert np.isinf(steps["brier"])


def test_questions():
    experiment = load("questions")
    prices = experiment.prices()
    assert prices.nats.tolist() == pytest.approx([0, 0.10536, 2.30259, 4.60517], abs=1e-5)
    assert prices.bits.tolist() == pytest.approx([0, 0.15200, 3.32193, 6.64386], abs=1e-5)
    assert experiment.huffman([0.1, 0.4, 0.5]) == [2, 2, 1]
    assert experiment.huffman([0.5, 0.25, 0.125, 0.125]) == [1, 2, 3, 3]
    bits = experiment.run(tokens=20_000).set_index("code").bits_per_token
    assert bits["entropy"] == pytest.approx(1.36096, abs=1e-5)
    assert bits["Huffman"] == pytest.approx(1.5)
    assert bits["its draw"] <= bits["range coder"] < bits["its draw"] + 0.01
    assert bits["range coder"] == pytest.approx(bits["entropy"], abs=0.03)


def test_old_map():
    experiment = load("old_map")
    found = experiment.run().set_index("map")
    assert found.cross_entropy["P itself"] == pytest.approx(1.36096, abs=1e-5)
    assert (found.cross_entropy["uniform"], found.kl["uniform"]) == pytest.approx((1.58496, 0.22400), abs=1e-5)
    turned = found.loc["P turned round"]
    assert (turned.cross_entropy, turned.kl) == pytest.approx((2.28974, 0.92877), abs=1e-5)
    assert np.isinf(found.cross_entropy["a street missing"])
    assert np.isfinite(found.kl_back["a street missing"])
    assert found.kl["uniform"] != pytest.approx(found.kl_back["uniform"], rel=0.01)
    along = experiment.path()
    finite = along[np.isfinite(along.kl)]
    np.testing.assert_allclose(finite["sum"], finite.cross_entropy, rtol=1e-5)
    assert finite.share[finite.cross_entropy.idxmin()] == pytest.approx(0, abs=0.06)


def test_a_script_runs_from_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, FOLDER / "low_probability.py"], capture_output=True, text=True, check=True)
    assert "brier" in done.stdout
    assert (tmp_path / "runs" / "low_probability" / "headline.png").stat().st_size > 10_000
