"""Profiles against closed forms in high precision, budgets against arithmetic, and files that are wrong."""

import decimal

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pandas as pd
import pytest

from xentlab import LOSSES, LabError, at_target, charts, facts_of
from xentlab.gradients import PATHS, gradient_budget, gradient_profile, load_batch, path_logits, profile_points

PROBABILITIES = [0.99, 0.5, 0.05, 1e-3, 1e-6, 1e-9, 1e-12]
VOCAB = 4


def others(p, rivals):
    """The wrong classes' probabilities along a path, in 60 digits."""
    share = (1 - p) / (VOCAB - 1)
    return [share] * (VOCAB - 1) if rivals == "even" else [1 - (VOCAB - 1) * p] + [p] * (VOCAB - 2)


def exact_dlogit(name, p, rivals):
    """dL/dz_y by the table's closed forms, in 60 decimal digits."""
    decimal.getcontext().prec = 60
    p = decimal.Decimal(p)
    q = others(p, rivals)
    norm2 = p * p + sum(x * x for x in q)
    return {
        "nll": lambda: p - 1,
        "brier": lambda: 2 * p * ((p - 1) - (p * (p - 1) + sum(x * x for x in q))),
        "spherical": lambda: p / norm2.sqrt() * (p * p / norm2 - 1),
        "mae": lambda: -2 * p * (1 - p),
        "generalized_cross_entropy": lambda: -(p ** decimal.Decimal("0.7")) * (1 - p),
        "focal": lambda: (2 * (1 - p) * p.ln() * p - (1 - p) ** 2) * (1 - p),
        "poly1": lambda: (1 + p) * (p - 1),
        "jensen_shannon": lambda: (p / (1 + p)).ln() / 2 * p * (1 - p),
        "mixce": lambda: -(1 + p) / 2 * (1 - p),
        "exponential": lambda: -(1 / p - 1),
        "tsallis": lambda: (
            decimal.Decimal("0.75")
            * (p ** decimal.Decimal("1.5") - p * sum(x ** decimal.Decimal("1.5") for x in [p, *q]) - p.sqrt() * (1 - p))
        ),
    }[name]()


@pytest.mark.parametrize("rivals", PATHS)
@pytest.mark.parametrize(
    "name",
    [
        "nll",
        "brier",
        "spherical",
        "mae",
        "generalized_cross_entropy",
        "focal",
        "poly1",
        "jensen_shannon",
        "mixce",
        "exponential",
        "tsallis",
    ],
)
def test_profile_equals_sixty_digits(name, rivals):
    profile = gradient_profile([name], PROBABILITIES, VOCAB, rivals).dropna()
    assert len(profile) == (7 if rivals == "even" else 5)
    for row in profile.itertuples():
        # float64 keeps 2e-16; the logit of p = 1e-12 rounds by 27 * 1e-16, and so does p itself: 1e-13 leaves room for ten.
        exact = float(exact_dlogit(name, row.p, rivals))
        assert abs(row.dvalue_dlogit / exact - 1) < (1e-13 if row.p < 0.9 else 1e-12)


@pytest.mark.parametrize("vocab", [3, 50, 99, 104, 198])
def test_where_the_path_begins_there_is_no_number(vocab):
    """Whichever way 1 / p is rounded."""
    rows = gradient_profile(["nll"], [1 / (vocab - 1), 0.5 / (vocab - 1)], vocab, "one")
    assert np.isnan(rows.dvalue_dlogit).tolist() == [True, False]


@pytest.mark.parametrize("rivals", PATHS)
def test_slope_in_p_is_the_total_derivative_along_the_path(rivals):
    """Against differences of the value along the path itself, for every loss of the catalogue."""
    p = np.array([0.2, 0.01, 1e-4])
    names = [name for name, loss in LOSSES.items() if not facts_of(loss).stops_gradient]
    # One profile for all three, which compiles each loss once.
    profile = gradient_profile(names, np.concatenate([p, p * (1 - 1e-6), p * (1 + 1e-6)]), VOCAB, rivals)
    value = profile.value.to_numpy().reshape(len(names), 3, 3)
    slope = (value[:, 2] - value[:, 1]) / (2e-6 * p)
    np.testing.assert_allclose(profile.dvalue_dp.to_numpy().reshape(len(names), 3, 3)[:, 0], slope, rtol=1e-5, atol=1e-6)


def test_paths_have_the_probabilities_they_are_named_by():
    p = np.array([0.3, 1e-3, 1e-12])
    for rivals in PATHS:
        z, _ = path_logits(p, VOCAB, rivals)
        share = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        np.testing.assert_allclose(share[:, 0], p, rtol=1e-12)
    assert np.isnan(path_logits(np.array([0.5]), VOCAB, "one")[0]).all()
    assert not np.isnan(path_logits(np.array([0.5]), 2, "one")[0]).any()


def test_a_profile_has_every_power_of_ten():
    points = profile_points()
    assert (len(points), points[-1]) == (56, 0.99)
    assert (np.abs(points[None] / 10.0 ** np.arange(-12, 0)[:, None] - 1).min(axis=1) < 1e-12).all()


def test_a_profile_goes_as_far_down_as_float64():
    """Where 1 - p and 1 - 15 p are 1; the slopes by hand, as of Brier's (1 - p)^2 + (1 - 15 p)^2 + 14 p^2."""
    p = np.array([1e-170, 1e-299])
    found = gradient_profile(["nll", "brier", "exponential"], p, vocab=16, rivals="both").groupby(["loss", "rivals"])
    expected = {
        ("nll", "even"): (-1 / p, -1, (16 / 15) ** 0.5),
        ("nll", "one"): (-1 / p, -1, 2**0.5),
        ("brier", "one"): (-32, -4 * p, 1096**0.5 * p),
        ("exponential", "even"): (-np.inf, -1 / p, (16 / 15) ** 0.5 / p),  # -1 / p^2
        ("exponential", "one"): (-np.inf, -1 / p, 2**0.5 / p),
    }
    for key, numbers in expected.items():
        rows = found.get_group(key)[["dvalue_dp", "dvalue_dlogit", "gradient_norm"]].to_numpy()
        # A logit of -700 rounds by 1e-13.
        np.testing.assert_allclose(rows, np.stack([np.broadcast_to(each, 2) for each in numbers], 1), rtol=1e-12)


def test_both_paths_are_one_after_the_other():
    apart = [gradient_profile(["nll", "hinge"], [0.9, 0.01], VOCAB, path) for path in PATHS]
    both = gradient_profile(["nll", "hinge"], [0.9, 0.01], VOCAB, "both")
    pd.testing.assert_frame_equal(both, pd.concat(apart, ignore_index=True), rtol=1e-14)


def test_headline_numbers():
    """CLAIMS 9: 1/p in p, 1 - p in the logit; what vanishes is the square loss on probabilities."""
    profile = gradient_profile(["nll", "brier", "hinge", "mse_logits"], [0.9, 0.1, 0.01, 1e-6, 1e-9]).set_index(["loss", "p"])
    for p in (0.9, 0.1, 0.01):
        assert profile.dvalue_dlogit["nll", p] == pytest.approx(-(1 - p), rel=1e-12)
        assert profile.dvalue_dp["nll", p] == pytest.approx(-1 / p, rel=1e-12)
    ratio = profile.dvalue_dlogit["brier", 1e-6] / profile.dvalue_dlogit["brier", 1e-9]
    assert ratio == pytest.approx(1e3, rel=1e-5)
    assert profile.dvalue_dlogit["hinge", 1e-9] == pytest.approx(-1)
    assert profile.dvalue_dlogit["mse_logits", 1e-9] < -30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probabilities": [0.0]}, "strictly between"),
        ({"probabilities": []}, "strictly between"),
        ({"probabilities": [float("nan")]}, "strictly between"),
        ({"probabilities": [1e-301]}, "from 1e-300 on; got .1e-301."),
        ({"probabilities": ["a"]}, "from 1e-300 on; got .'a'."),
        ({"vocab": 1}, "at least 2"),
        ({"vocab": "4"}, "at least 2; got '4'"),
        ({"vocab": 4.0}, "at least 2; got 4.0"),
        ({"rivals": "two"}, "even, one or both"),
    ],
)
def test_profile_refuses(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match=message):
        gradient_profile(["nll"], **arguments)


def make_batch(tokens=200, vocab=11, seed=0):
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((tokens, vocab))).astype(np.float32), rng.integers(0, vocab, tokens)


def test_budget_equals_numpy():
    logits, targets = make_batch()
    bins = [0, 0.01, 0.1, 0.5, 1]
    p = np.exp(logits.astype(float))
    p /= p.sum(-1, keepdims=True)
    error = p - np.eye(11)[targets]
    right = p[np.arange(200), targets]
    assert len(np.unique(np.digitize(right, bins))) == 4
    norms = np.linalg.norm(error, axis=-1)
    budget = gradient_budget(["nll"], logits, targets, bins)
    for row in budget.itertuples():
        inside = (right >= row.p_low) & (right < row.p_high)
        assert row.tokens == inside.sum()
        assert row.share_of_tokens == pytest.approx(inside.mean())
        assert row.gradient == pytest.approx(norms[inside].mean(), rel=1e-5)
        assert row.share_of_gradient == pytest.approx(norms[inside].sum() / norms.sum(), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("logits", "low"),
    [
        (np.zeros(10), 0.1),
        (np.zeros(100), 0.01),
        (np.zeros(1000), 1e-3),
        (np.log([9.0, 1.0]), 0.9),
        (np.log([99.0, 1.0]), 0.99),
        (np.log([8.9999, 1.0]), 0.75),
        (np.log([98.999, 1.0]), 0.9),
    ],
)
def test_a_token_on_an_edge_falls_into_the_bin_above_it(logits, low, dtype):
    budget = gradient_budget(["nll"], logits[None].astype(dtype), np.zeros(1, int))
    assert budget.p_low[budget.tokens == 1].tolist() == [low]


def test_logits_in_float64_have_their_probabilities():
    """Of 16,384 float32 has no neighbour at 1e-3; two tokens, a step of float32 apart, lie beside an edge."""
    logits = 2.0**14 + np.array([[0, 1e-4], [1e-4, 0]])
    assert gradient_budget(["nll"], logits, np.zeros(2, int), [0, 0.5, 1]).tokens.tolist() == [1, 1]


@pytest.mark.parametrize("bins", [(0, np.nan, 1), "abc", [[0, 0.5], [0.5, 1]], [0, 0.5], [0, 0.5, 0.5, 1], [], [0, None, 1]])
def test_bins_rise_from_0_to_1(bins, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match="bins are rising edges from 0 to 1; got "):
        gradient_budget(["nll"], np.zeros((2, 3)), np.zeros(2, int), bins)


def test_shares_sum_to_one_for_every_loss():
    budget = gradient_budget(LOSSES, *make_batch()).groupby("loss")[["share_of_tokens", "share_of_gradient"]].sum()
    np.testing.assert_allclose(budget, 1, rtol=1e-9)


def test_budget_does_not_depend_on_the_chunks(monkeypatch):
    """A batch of more than one chunk with a ragged tail: here 2^23 / 70,000 = 119 tokens a chunk."""
    rng = np.random.default_rng(1)
    logits, targets = rng.standard_normal((125, 70_000)).astype(np.float32), rng.integers(0, 70_000, 125)
    whole = gradient_budget(["nll"], logits, targets, [0, 1e-5, 1])
    parts = [gradient_budget(["nll"], logits[s], targets[s], [0, 1e-5, 1]) for s in (slice(0, 60), slice(60, 125))]
    assert whole.tokens.tolist() == (parts[0].tokens + parts[1].tokens).tolist()
    total = sum((part.gradient.fillna(0) * part.tokens).to_numpy() for part in parts)
    np.testing.assert_allclose(whole.gradient.fillna(0) * whole.tokens, total, rtol=1e-5)


def test_budget_reads_files(tmp_path):
    logits, targets = make_batch()
    np.savez(tmp_path / "both.npz", logits=logits.reshape(20, 10, 11), targets=targets.reshape(20, 10))
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "targets.npy", targets)
    direct = gradient_budget(["nll"], logits, targets)
    assert gradient_budget(["nll"], tmp_path / "both.npz").equals(direct)
    assert gradient_budget(["nll"], "logits.npy", "targets.npy").equals(direct)


def test_what_one_rival_cannot_reach_is_nan_in_every_column():
    found = gradient_profile(["hinge", "nll"], [0.5, 0.01], vocab=16, rivals="one")
    numbers = found[["value", "dvalue_dp", "dvalue_dlogit", "gradient_norm"]]
    assert numbers[found.p == 0.5].isna().all(axis=None)
    assert np.isfinite(numbers[found.p == 0.01]).all(axis=None)


def test_what_cannot_be_reached_is_not_asked_of_a_loss():
    with jax.debug_nans(True):
        assert len(gradient_profile(["nll"], [0.9, 0.01], 4, "both")) == 4


def test_an_infinite_gradient_is_kept_and_not_drawn():
    """Logits taken for probabilities: at p = 1/V they are 0, where -log is infinite, and so is its slope."""
    taken = lambda logits, targets: -jnp.log(at_target(logits, targets))
    found = gradient_profile([taken, "nll"], [0.5, 0.1, 0.01], vocab=10, rivals="both")
    assert np.isinf(found.dvalue_dlogit).any()
    for space in charts.SPACES:
        for rivals in charts.PATHS:
            drawn = charts.profile(found, list(dict.fromkeys(found.loss)), space, rivals).data
            assert len(drawn)
            assert np.isfinite(drawn["size"]).all()


def _save(tmp_path, **arrays):
    np.savez(tmp_path / "bad.npz", **arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros((2, 3))}, "holds z; it needs arrays named logits and targets"),
        ({"logits": np.zeros((2, 3), int), "targets": np.zeros(2, int)}, "floating"),
        ({"logits": np.zeros((2, 3)), "targets": np.zeros(2)}, r"targets.astype\(int\)"),
        ({"logits": np.zeros((2, 3)), "targets": np.zeros(3, int)}, r"\[2, 3\] and \[3\]"),
        (
            {"logits": np.zeros((3, 2)), "targets": np.zeros(2, int)},
            r"Is axis 0 the vocabulary\? Take numpy.moveaxis\(logits, 0",
        ),
        ({"logits": np.zeros((4, 3, 2)), "targets": np.zeros((4, 2), int)}, r"numpy.moveaxis\(logits, 1, -1\)"),
        (
            {"logits": np.zeros((2, 3), jnp.bfloat16), "targets": np.zeros(2, int)},
            r"got \|V2\. .* logits.astype\(numpy.float32\)",
        ),
        ({"logits": np.zeros((0, 3)), "targets": np.zeros(0, int)}, "at least one token"),
        ({"logits": np.zeros((2, 3)), "targets": np.array([0, 7])}, r"\[0, 3\); got 7 at token 1 .*tokenizer"),
        (
            {"logits": np.zeros((2, 3)), "targets": np.array([0, -100])},
            r"got -100 at token 1 \(1 such\)\. Leave ignored tokens out",
        ),
        ({"logits": np.full((2, 3), -np.inf), "targets": np.array([0, 1])}, "nor all -inf; they are at token 0"),
        ({"logits": np.array([[0.0, 0], [np.inf, 0]]), "targets": np.array([0, 1])}, "NaN or .inf, .*; they are at token 1"),
        ({"logits": np.full((2, 3), np.nan), "targets": np.array([0, 1])}, "NaN or .inf, nor all -inf; they are at token 0"),
    ],
)
def test_budget_refuses_files(tmp_path, arrays, message):
    _save(tmp_path, **arrays)
    with pytest.raises(LabError, match=message):
        load_batch(tmp_path / "bad.npz")


@pytest.mark.parametrize("logit", [1e300, -1e300])
def test_budget_refuses_what_float32_does_not_hold(logit):
    with pytest.raises(
        LabError, match=r"float32, which holds no logit of -?1e\+300, at token 1: .* from -3.4e\+38 to 3.4e\+38"
    ):
        load_batch(np.array([[0.0, -np.inf], [logit, 0.0]]), np.array([0, 1]))


def test_a_damaged_file_is_told(tmp_path):
    """NumPy, zipfile, zlib and Python's parser each have an error of their own."""
    np.savez_compressed(tmp_path / "whole.npz", logits=make_batch()[0])
    np.save(tmp_path / "whole.npy", make_batch()[0])
    packed, plain = (tmp_path / "whole.npz").read_bytes(), (tmp_path / "whole.npy").read_bytes()
    flipped = lambda file, at: file[:at] + bytes([file[at] ^ 0xFF]) + file[at + 1 :]
    opened = plain.replace(b"'descr'", b"('desc'"), plain.replace(b"'shape':", b"'shape' ")
    for damaged in (packed[:999], packed[:-30], flipped(packed, 200), flipped(packed, 999), *opened, plain[:999]):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(LabError, match=r"damaged, or not an .npz or .npy of plain arrays\. Write one"):
            load_batch(tmp_path / "damaged.npz")


def test_narrow_logits_are_read_wide():
    logits, targets = load_batch(np.asarray(jnp.ones((2, 3), jnp.bfloat16)), np.array([0, 1]))
    assert (logits.dtype, targets.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(("factor", "length", "share"), [(1e30, 2**0.5 * 1e30, 1), (0, 0, 0)])
def test_gradients_of_any_length_have_shares(factor, length, share):
    """Also such as leave float32 when they are squared; a token on an edge falls into the bin above it."""
    budget = gradient_budget([lambda z, y: factor * z.sum(-1)], np.zeros((4, 2)), np.zeros(4, int), [0, 0.5, 1])
    assert budget.tokens.tolist() == [0, 4]
    assert budget.gradient[1] == pytest.approx(length)
    assert budget.share_of_gradient.tolist() == [0, share]


def test_budget_refuses_what_is_no_array(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(LabError, match="plain arrays"):
        load_batch(tmp_path / "text.npz")
    with pytest.raises(LabError, match="no file"):
        load_batch(tmp_path / "none.npz")
    with pytest.raises(LabError, match=f"{tmp_path} is a folder. Logits come as"):
        load_batch(tmp_path)
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(LabError, match=r"plain arrays\. Write one with numpy\.savez") as said:
        load_batch(tmp_path / "pickled.npy")
    assert "allow_pickle" not in str(said.value)
    np.save(tmp_path / "logits.npy", np.zeros((2, 3)))
    with pytest.raises(LabError, match="give the targets too"):
        load_batch(tmp_path / "logits.npy")


def test_a_gradient_that_is_infinite_leaves_no_shares():
    """Those of the other bins are not 0: nothing can be said of them."""
    logits, targets = np.array([[0.0, -np.inf], [0.0, 0.0]], np.float32), np.array([0, 1])
    budget = gradient_budget(["mse_logits"], logits, targets, [0, 0.9, 1])
    assert budget.share_of_gradient.isna().all()
    assert budget.gradient[1] == np.inf
    assert budget.gradient[0] > 0


def test_a_loss_that_takes_no_float64_is_named():
    narrow = lambda logits, targets: jax.lax.sub(LOSSES["nll"](logits, targets), jnp.zeros(targets.shape, jnp.float32))
    with pytest.raises(LabError, match=r"<lambda> fails on float64 logits \[1, 4\]: TypeError: .* has theirs, logits\.dtype"):
        gradient_profile([narrow], [0.1], vocab=4)


def test_of_two_classes_one_rival_reaches_certainty():
    p = np.array([0.9, 1 - 1e-9, 1 - 1e-12])
    found = gradient_profile(["nll"], p, vocab=2, rivals="one")
    np.testing.assert_allclose(found.value, -np.log(p), rtol=1e-9)
    np.testing.assert_allclose(found.dvalue_dp, -1 / p, rtol=1e-9)


def test_what_else_an_npz_holds_is_not_read(tmp_path):
    logits, targets = np.zeros((3, 4), np.float32), np.arange(3)
    np.savez(tmp_path / "b.npz", logits=logits, targets=targets, about=np.array({"a": 1}, object))
    assert gradient_budget(["nll"], tmp_path / "b.npz").tokens.sum() == 3
