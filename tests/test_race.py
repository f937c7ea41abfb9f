"""A race is fair, its metrics are through each loss's own link, and it says where it falls short."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.stats
from hypothesis import strategies as st

from xentlab import LOSSES, LabError, loss, reading
from xentlab.checkpoints import Checkpoints, Stopped
from xentlab.defaults import quiet
from xentlab.examine import TEST_METRICS, Examined
from xentlab.metrics import SMOOTHING
from xentlab.program import windows
from xentlab.race import _tuned, beyond, race
from xentlab.reading import pairs
from xentlab.results import Finished, _pooled, _summarised, best_rate, paired
from xentlab.sources import MarkovSource, Text
from xentlab.tour import reported
from xentlab.training import Trained

TRAINS = True
SOURCE = MarkovSource(vocab=8, tokens=20_000, seed=3)


@pytest.fixture(scope="module")
def finished():
    options = {"blocks": 3, "validation_tokens": 2000, "extensions": 0}
    return race(["nll", "brier", "entmax15"], SOURCE, "bigram", [0.003, 0.1], [0, 1, 2], 150, **options)


def test_frames_are_tidy(finished):
    curves, table = finished.curves, finished.table
    assert len(curves) == 3 * 2 * 3 * 3
    assert list(table.loss) == ["nll", "brier", "entmax15"]
    assert set(TEST_METRICS) < set(table.columns)
    assert not curves.duplicated(["source", "loss", "rate", "seed", "step"]).any()


def test_the_law_is_approached_and_never_passed(finished):
    """A test NLL lies above the chain's entropy rate by the model's divergence, and the rest is the draw of the test part."""
    for row in finished.table.itertuples():
        assert 0 < row.kl_to_law < 0.1
        assert row.beyond_law < 0
        assert row.test_nll == pytest.approx(SOURCE.entropy_rate + row.kl_to_law, abs=0.05)
        assert np.isnan(row.bits_per_byte)
        assert row.test_nll_low < row.test_nll < row.test_nll_high


def test_a_row_is_of_the_seed_that_it_names_and_the_predictor_of_the_first(finished):
    best = finished.table.best_rate[0]
    alone = race(["nll"], SOURCE, "bigram", [best], [0], 150, blocks=3, validation_tokens=2000, extensions=0)
    row = finished.tests.set_index(["loss", "seed"]).loc[("nll", 0), list(TEST_METRICS)]
    np.testing.assert_allclose(row.astype(float), alone.tests.loc[0, list(TEST_METRICS)].astype(float), rtol=1e-5)
    first, other = (each.predictors["nll"].model.weight for each in (finished, alone))
    np.testing.assert_allclose(first, other, rtol=1e-5, atol=1e-6)
    assert set(finished.frequency.seed) == {0, 1, 2}
    assert (finished.table.uniform_nll == np.log(8)).all()


def test_runs_are_pooled_by_their_tokens():
    rows = [dict(zip(("tokens", "confidence", "accuracy"), each, strict=True)) for each in ((1, 0.6, 0.0), (3, 1.0, 1.0))]
    (pooled,) = _pooled([{"bin_low": 0.5, "bin_high": 1.0, **row} for row in rows])
    assert pooled == {"bin_low": 0.5, "bin_high": 1.0, "tokens": 4, "confidence": pytest.approx(0.9), "accuracy": 0.75}


def test_what_is_a_share_is_at_most_1_and_nothing_is_negative():
    """Of .1 and .9 Student's interval ends at -4.6 and 5.6."""
    examined = [Examined(dict.fromkeys(TEST_METRICS, value), {}, []) for value in (0.1, 0.9)]
    row = _summarised(Finished("nll", made([2.0, 2.0, 3.0, 3.0]), [0, 1], None, examined), 8)
    for metric in TEST_METRICS:
        if metric == "temperature":
            continue
        high = 1 if metric in ("accuracy", "calibration_error", "tempered_calibration_error") else 5.582
        low = 1 if metric == "perplexity" else 0
        assert (row[f"{metric}_low"], row[f"{metric}_high"]) == pytest.approx((low, high), abs=1e-3), metric


@pytest.mark.parametrize(("temperatures", "mean", "edge"), [((64.0, 1 / 64), 1.0, True), ((4.0, 1.0), 2.0, False)])
def test_the_mean_of_temperatures_is_that_of_factors(temperatures, mean, edge):
    examined = [Examined(dict.fromkeys(TEST_METRICS, 0.5) | {"temperature": each}, {}, []) for each in temperatures]
    row = _summarised(Finished("nll", made([2.0, 2.0, 3.0, 3.0]), [0, 1], None, examined), 8)
    assert (row["temperature"], row["temperature_at_edge"]) == (pytest.approx(mean), edge)
    assert (row["temperature_low"], row["temperature_high"]) == pytest.approx((1 / 64, 64))


def test_no_interval_reaches_past_what_there_can_be():
    """Of two seeds Student's t is twelve standard errors wide to either side."""
    table = race(["nll"], SOURCE, "bigram", [0.1], [0, 1], 5, extensions=0, validation_tokens=500).table
    assert 0 <= table.accuracy_low[0] < table.accuracy[0] < table.accuracy_high[0] <= 1
    assert np.isnan(table.bits_per_byte_low[0])
    single = race(["nll"], SOURCE, "bigram", [0.1], [0], 5, extensions=0, validation_tokens=500).table
    assert np.isnan([single.accuracy_low[0], single.accuracy_high[0]]).all()


def test_the_best_rate_is_the_best_and_the_edge_is_said(finished):
    last = finished.curves[finished.curves.step == 150].groupby(["loss", "rate"]).validation_nll.mean()
    for row in finished.table.itertuples():
        assert row.best_rate == last[row.loss].idxmin()
        assert row.rate_at_edge
    assert not race(["nll"], SOURCE, "bigram", [0.1], [0], 5).table.rate_at_edge[0]


def test_a_grid_that_grew_is_the_grid_that_was_meant():
    """From two rates that are far too small: the runs are those of the whole grid, and the best one has neighbours."""
    options = {"steps": 20, "blocks": 2, "validation_tokens": 500}
    grown = race(["nll"], SOURCE, "bigram", [1e-3, 1e-2], [0, 1], **options)
    asked = race(["nll"], SOURCE, "bigram", sorted(set(grown.curves.rate)), [0, 1], extensions=0, **options)
    assert not grown.table.rate_at_edge[0]
    assert grown.table.best_rate[0] > 1e-2
    order = ["rate", "seed", "step"]
    one, other = (each.curves.sort_values(order).drop(columns=["source", "loss"]) for each in (grown, asked))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(grown.table.test_nll, asked.table.test_nll, rtol=1e-6)
    assert len(race(["nll"], SOURCE, "bigram", [1e-3, 1e-2], [0, 1], extensions=1, **options).curves.rate.unique()) == 3


def test_a_grid_grows_where_the_best_rate_sits():
    """By the grid's own step, up, down, and down where all diverged; not around a best rate with neighbours."""

    def tried(score, rates, extensions=3):
        seen = []

        def at(rates):
            seen.extend(rates)
            nll = np.array([[score(rate)] for rate in rates])
            return Trained(np.array(rates), np.zeros(len(rates)), np.array([1]), nll, nll, np.zeros(len(rates), int),
                           np.where(np.isfinite(nll[:, 0]), -1, 0), None)  # fmt: skip

        _tuned(at, rates, extensions)
        return seen[len(rates) :]

    assert tried(lambda rate: abs(np.log(rate / 100)), [0.1, 1]) == [10, 100, 1000]
    assert tried(lambda rate: abs(np.log(rate / 0.25)), [1, 2]) == [0.5, 0.25, 0.125]
    assert tried(lambda rate: np.nan, [1, 4], 2) == [0.25, 0.0625]
    assert tried(lambda rate: abs(rate - 2), [1, 2, 3]) == tried(lambda rate: rate, [1]) == []


def test_a_grid_grows_by_the_step_at_its_own_end():
    assert (beyond([1, 2, 8], 1.0), beyond([1, 2, 8], 8.0)) == (0.5, 32)


def test_pairs_are_of_one_seed(finished):
    """Against the differences by hand, and SciPy's own interval of their mean."""
    tests = finished.tests.pivot(index="seed", columns="loss", values="test_nll")
    pairs = finished.pairs[finished.pairs.metric == "test_nll"]
    assert list(pairs.loss) == ["brier", "entmax15"]
    for row in pairs.itertuples():
        differences = tests[row.loss] - tests["nll"]
        assert row.against == "nll"
        assert row.difference == pytest.approx(differences.mean())
        students = scipy.stats.ttest_1samp(differences, 0).confidence_interval()
        assert (row.low, row.high) == pytest.approx((students.low, students.high))  # the wider one, of few seeds
        assert row.tells_apart == (row.low > 0 or row.high < 0)
    mean = finished.tests.groupby("loss").test_nll.mean()
    for row in finished.table.itertuples():
        assert row.test_nll == pytest.approx(mean[row.loss])


def test_without_nll_pairs_are_against_the_first_loss():
    scores = {"loss": ["mae", "mae", "brier", "brier"], "seed": [0, 1, 0, 1], "test_nll": [1.0, 2.0, 3.0, 4.0]}
    (row,) = paired(pd.DataFrame(scores).assign(source="s")).itertuples()
    assert (row.loss, row.against, row.difference) == ("brier", "mae", 2)


@pytest.mark.parametrize(("by", "apart"), [(2e-7, False), (1e-5, True)])
def test_a_rounding_of_float32_is_no_difference(by, apart):
    scores = {"loss": ["nll", "nll", "mae", "mae"], "seed": [0, 1, 0, 1], "test_nll": [1.8, 1.7, 1.8 + by, 1.7 + by]}
    found = paired(pd.DataFrame(scores).assign(source="s"))
    assert list(found.tells_apart) == [apart]
    assert ("which is float32's rounding" in pairs(found)[0]) != apart


@hypothesis.given(st.integers(3, 9), st.floats(-3, 3))
def test_an_interval_that_covers_0_says_so(seeds, shift):
    """Differences that spread around 0 are not told apart, and shifted by more than Student's half width they are."""
    spread = np.linspace(-1, 1, seeds)
    half = scipy.stats.t.ppf(0.975, seeds - 1) * spread.std(ddof=1) / seeds**0.5
    hypothesis.assume(abs(abs(shift) - half) > 1e-4)  # past rounding
    tests = pd.DataFrame({"source": "s", "seed": range(seeds), "loss": "nll", "test_nll": 5.0})
    both = pd.concat([tests, tests.assign(loss="mae", test_nll=5.0 + spread + shift)])
    row = paired(both).iloc[0]
    assert row.difference == pytest.approx(shift)
    assert row.tells_apart == (row.low > 0 or row.high < 0)
    assert row.tells_apart == (abs(shift) > half)
    said = " ".join(pairs(paired(both)))
    assert ("covers 0" in said) == (not row.tells_apart)
    one = paired(both[both.seed == 0])
    assert one.low.isna().all()
    assert pairs(one) == ["On s each loss has one seed, which tells none from another: take more."]


@pytest.mark.parametrize("scores", [[np.inf, 1, 2], [np.inf, -np.inf, 0], [np.inf] * 3])
@pytest.mark.parametrize("base", [0.0, np.inf])
def test_where_a_score_is_infinite_no_interval_is_told(scores, base):
    """No seed is dropped and nothing warns; a difference of infinities is not known."""
    tests = pd.DataFrame({"source": "s", "seed": range(3), "loss": "nll", "test_nll": base})
    both = pd.concat([tests, tests.assign(loss="mae", test_nll=scores)])
    row = paired(both).iloc[0]
    assert row.seeds == 3
    assert np.isnan([row.low, row.high]).all()
    assert not row.tells_apart
    (said,) = pairs(paired(both))
    assert "covers 0" not in said
    assert "nan" not in said


@pytest.mark.parametrize("seeds", [3, 5])
def test_where_nothing_differs_seldom_anything_is_told_apart(seeds):
    """In one of twenty, as an interval of 95% promises; the bootstrap's own did in a quarter of the cases with three seeds."""
    draws = np.random.default_rng(0).normal(size=(200, seeds))
    tests = pd.DataFrame({"source": np.repeat(np.arange(200), seeds), "seed": np.tile(np.arange(seeds), 200), "loss": "nll"})
    both = pd.concat([tests.assign(test_nll=0.0), tests.assign(loss="twin", test_nll=draws.reshape(-1))])
    assert 0.01 < paired(both).tells_apart.mean() < 0.09


@pytest.mark.parametrize(("nats", "said"), [(0.0123456, "0.012"), (3e-7, "3.0e-07")])
def test_a_difference_of_rounding_is_not_told_as_none(nats, said):
    tests = pd.DataFrame({"source": "s", "seed": range(3), "loss": "nll", "test_nll": 0.0})
    sentence = pairs(paired(pd.concat([tests, tests.assign(loss="twin", test_nll=-nats)])))[0]
    assert f"ahead of it twin (-{said}, [-{said}, -{said}])." in sentence


def test_seeds_pair_the_losses(finished):
    """Every loss starts from the same parameters: after a tiny step at a tiny rate they still agree."""
    start = race(["nll", "brier"], SOURCE, "bigram", [1e-12], [0], 1).curves.validation_nll
    assert start[0] == pytest.approx(start[1], rel=1e-6)


def one(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def another_one(logits, targets):
    return one(logits, targets)


def test_a_seed_gives_every_loss_the_same_batches():
    curves = race([one, another_one], SOURCE, "bigram", [0.03, 0.1], [0, 1], 12, blocks=3, extensions=0).curves
    numbers = ["rate", "seed", "step", "train_loss", "validation_nll"]
    first, second = (curves[curves.loss == name][numbers].to_numpy() for name in ("one", "another_one"))
    assert np.array_equal(first, second)
    assert len(np.unique(first[:, 3])) == len(first)  # and every seed other ones


class Parts:
    """Training and test alternate between two tokens; validation is even over four."""

    name, vocab, order, token_bytes = "parts", 4, 1, None

    def split(self, part):
        if part == "validation":
            return np.random.default_rng(0).integers(0, 4, 2000, dtype=np.int32)
        return np.tile(np.array([0, 1], np.int32), 1000)

    def describe(self):
        return {"kind": "parts", "vocab": 4}


def test_rates_and_what_is_mixed_in_are_chosen_on_validation_and_the_table_is_of_the_test():
    """On test the surest model is the best; validation wants the least sure one, of the least rate, and mixes in the most."""
    found = race(["nll"], Parts(), "bigram", [0.03, 0.3], [0, 1], 40, validation_tokens=1000, extensions=0).table.iloc[0]
    assert found.best_rate == 0.03
    assert found.smoothing == pytest.approx(max(SMOOTHING))
    assert found.validation_nll > np.log(4) * 0.9
    assert found.test_nll < 1
    assert found.accuracy == 1
    assert found.temperature > 2
    rows = reported.trials("arm", quiet, ["nll"], Parts(), "bigram", [0.03, 0.3], [0, 1], 40, blocks=1)
    assert (rows.rate < 0.3).all()
    assert (rows.test_nll < np.log(4)).all()


def test_labels_that_are_noise_alone_teach_what_is_wrong():
    for noise, accuracy in ((0.0, 1.0), (1.0, 0.0)):
        options = {"validation_tokens": 500, "extensions": 0, "label_noise": noise}
        assert race(["nll"], Parts(), "bigram", [0.3], [0, 1], 40, **options).table.accuracy[0] == accuracy


def test_an_optimizer_that_keeps_a_random_key_is_refused():
    noisy = lambda rate: optax.chain(optax.add_noise(0.01, 0.5, key=0), optax.sgd(rate))
    with pytest.raises(LabError, match="keeps a random key"):
        race(["nll"], SOURCE, "bigram", [0.1], [0], 2, optimizer=noisy)


def test_each_loss_is_read_through_its_own_link():
    """Square loss on logits learns P itself; through a softmax it would be far from the law."""
    table = race(["mse_logits"], SOURCE, "bigram", [0.1], [0, 1], 200).table
    assert table.kl_to_law[0] < 0.05


def test_bits_per_byte_are_nats_over_log_2_for_bytes(tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat on the mat and the dog lay by the door. " * 200)
    table = race(["nll"], Text(tmp_path / "t.txt"), "bigram", [0.1], [0, 1], 30).table
    assert table.bits_per_byte[0] == pytest.approx(table.test_nll[0] / np.log(2), rel=1e-5)
    assert np.isnan(table.kl_to_law[0])


def test_second_order_law_is_scored_where_a_window_has_shown_enough():
    source = MarkovSource(vocab=4, order=2, tokens=5000)
    result = race(["nll"], source, "mlp(context=2, width=8, inner=16, features=8)", [0.03], [0], 60)
    seen = jnp.asarray(windows(source.split("test"), 32))
    said = np.asarray(result.predictors["nll"](seen[:, :-1]), np.float64)[:, 1:]
    law = np.asarray(source.law(jnp.stack([seen[:, :-2], seen[:, 1:-1]], axis=-1)), np.float64)
    assert result.table.kl_to_law[0] == pytest.approx(np.mean(np.sum(law * np.log(law / said), axis=-1)), rel=1e-4)


def made(final, diverged=(-1, -1, -1, -1)):
    rates = np.array([0.1, 0.1, 1.0, 1.0])
    nll = np.array(final, float)[:, None]
    return Trained(rates, np.array([0, 1, 0, 1]), np.array([9]), nll, nll, np.zeros(4, int), np.array(diverged), None)


def test_of_equal_rates_the_best_is_the_one_beyond_which_others_may_be_better():
    """What has not moved has too small a rate, what ends alike from another place too great a one."""
    same = made([2.0] * 4)
    unmoved, moved = (dataclasses.replace(same, validation_nll=np.array([[first, 2.0]] * 4)) for first in (2.0, 5.0))
    assert (best_rate(unmoved), best_rate(moved)) == (1.0, 0.1)


def test_a_mean_over_seeds_keeps_what_float32_would_lose():
    """Of seeds that differ in their last digit the means differ, too."""
    digit = np.float32(2**-22)
    close = dataclasses.replace(made([5.0] * 4), validation_nll=np.float32([[4.0], [4.0 + 2 * digit], [4.0], [4.0 + digit]]))
    assert best_rate(close) == 1.0


def test_a_rate_with_a_diverged_run_is_out():
    assert best_rate(made([2.0, 2.0, 1.0, 1.0])) == 1.0
    assert best_rate(made([2.0, 2.0, 1.0, np.nan], (-1, -1, -1, 5))) == 0.1
    assert np.isnan(best_rate(made([np.nan] * 4, (1, 1, 1, 1))))


def test_a_loss_that_diverges_everywhere_is_reported_and_the_rest_goes_on():
    table = race(["exponential", "nll"], SOURCE, "bigram", [1e38], [0, 1], 10, optimizer="sgd", clip=None).table
    assert table.diverged[0] == 2
    assert np.isnan(table.test_nll[0])
    assert np.isnan(table.best_rate[0])


def test_a_race_refuses():
    for arguments, message in (
        ({"speed": 3}, "no option 'speed'; a recipe's options: batch"),
        ({"learning_rates": [0.1, 0.1]}, "learning rates repeat"),
        ({"seeds": [1, 1]}, "seeds repeat"),
        ({"window": 5000}, "fewer than one window"),
        ({"steps": 2**31}, "steps is counted in 32 bits"),
        ({"clip": float("inf")}, "clip is a positive and finite length"),
    ):
        with pytest.raises(LabError, match=message):
            race(["nll"], SOURCE, "bigram", **arguments)


def test_numbers_may_be_arrays_of_jax(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    one, other = (
        race(["nll"], SOURCE, "bigram", numbers([0.1, 0.2]), numbers([0, 1]), numbers(4), batch=numbers(4), extensions=0)
        for numbers in (jnp.asarray, lambda each: each)
    )
    pd.testing.assert_frame_equal(one.table, other.table)


def test_a_link_is_read_as_it_is_at_the_race():
    factor = [1.0]
    own = loss(link=lambda z: jax.nn.softmax(factor[0] * z))(lambda z, y: LOSSES["nll"](z, y))

    def surest():
        (predictor,) = race([own], SOURCE, "bigram", [0.1], [0], 4, validation_tokens=500).predictors.values()
        return float(predictor(jnp.arange(4)).max() / (1 - predictor.smoothing))

    once, factor[0] = surest(), 30.0
    assert surest() > 2 * once


def test_progress_counts_the_steps_of_each_loss():
    calls = []
    race(["nll", LOSSES["mae"]], SOURCE, "bigram", [0.1], [0], 4, lambda *call: calls.append(call), blocks=2)
    assert calls == [("nll", 2, 4), ("nll", 4, 4), ("mae", 2, 4), ("mae", 4, 4)]


def test_losses_may_know_their_vocabulary():
    weights = jnp.linspace(1, 2, 8)
    by_class = lambda logits, targets: weights[targets] * LOSSES["nll"](logits, targets)
    prior = "logit_adjusted(prior=(.2, .2, .1, .1, .1, .1, .1, .1))"
    found = race([by_class, prior], MarkovSource(vocab=8, tokens=2000), "bigram", [0.1], [0], steps=4).table
    assert np.isfinite(found.test_nll).all()
    with pytest.raises(LabError, match="the vocabulary is 9"):
        race([prior], MarkovSource(vocab=9, tokens=2000), "bigram", [0.1], [0], steps=4)


def test_it_stops_between_examinations(tmp_path):
    """Which may be long: all runs stand in their checkpoints by then."""
    kept = Checkpoints(tmp_path)
    stopped = lambda loss, done, total: kept.stop.set() if done == total else None
    arguments = (["nll"], MarkovSource(vocab=8, tokens=2000), "bigram", [0.1], [0, 1])
    with pytest.raises(Stopped):
        race(*arguments, steps=4, progress=stopped, checkpoints=kept)
    again = race(*arguments, steps=4, checkpoints=Checkpoints(tmp_path))
    pd.testing.assert_frame_equal(again.table, race(*arguments, steps=4).table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["nll"], "book.txt"), r"an object, xentlab.sources.Text\('book.txt'\)"),
        ((["nll"], MarkovSource(8), "bigram", 0.1), "a list of each; got 0.1"),
        ((["nll"], MarkovSource(8), "bigram", [0.01, 0.0100000001]), "the learning rates repeat"),
        ((["nll"], MarkovSource(8), "bigram", [1e39]), "positive and finite"),
        ((["nll"], MarkovSource(8), "bigram", [1e-300]), "positive and finite"),
        ((["nll"], MarkovSource(8), "bigram", [0.1], [0.5]), "seeds are whole numbers"),
        ((["nll"], MarkovSource(8), "bigram", [0.1], [0], 4, quiet, None, 1.5), "grows by some rates or by none; got extens"),
    ],
)
def test_what_no_race_can_be_run_with_is_told_before(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match=message):
        race(*arguments)


def test_of_a_loss_without_a_pull_no_rate_is_said_to_be_best():
    """Every rate is as good, as where all of them are too small: greater ones are tried, and none is known to be enough."""
    still = lambda logits, targets: 0.0 * LOSSES["nll"](logits, targets)
    raced = race({"still": still}, SOURCE, "bigram", [0.1, 1.0], [0], 4, optimizer="sgd", extensions=1)
    assert sorted(set(raced.curves.rate)) == [0.1, 1.0, 10.0]
    row = raced.table.iloc[0]
    assert row.rate_at_edge
    assert row.perplexity >= 1
    assert "try others first. If they end there too: does it pull" in reading.races(raced.table, raced.curves)[0]
