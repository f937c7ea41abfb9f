"""A race is fair, its metrics are through each loss's own link, and it says where it falls short."""

import numpy as np
import pytest

from xentlab import LOSSES, LabError
from xentlab.race import TEST_METRICS, best_rate, race
from xentlab.sources import MarkovSource, Text
from xentlab.training import Trained

TRAINS = True
SOURCE = MarkovSource(vocab=8, tokens=20_000, seed=3)


@pytest.fixture(scope="module")
def finished():
    return race(["nll", "brier", "entmax15"], SOURCE, "bigram", [0.003, 0.1], [0, 1, 2], 150, blocks=3, validation_tokens=2000)


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
        assert row.test_nll == pytest.approx(SOURCE.entropy_rate + row.kl_to_law, abs=0.05)
        assert np.isnan(row.bits_per_byte)
        assert row.test_nll_low < row.test_nll < row.test_nll_high


def test_the_best_rate_is_the_best_and_the_edge_is_said(finished):
    last = finished.curves[finished.curves.step == 150].groupby(["loss", "rate"]).validation_nll.mean()
    for row in finished.table.itertuples():
        assert row.best_rate == last[row.loss].idxmin()
        assert row.rate_at_edge
    assert not race(["nll"], SOURCE, "bigram", [0.1], [0], 5).table.rate_at_edge[0]


def test_seeds_pair_the_losses(finished):
    """Every loss starts from the same parameters: after a tiny step at a tiny rate they still agree."""
    start = race(["nll", "brier"], SOURCE, "bigram", [1e-12], [0], 1).curves.validation_nll
    assert start[0] == pytest.approx(start[1], rel=1e-6)


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
    table = race(["nll"], source, "mlp(context=2, width=8, inner=16, features=8)", [0.03], [0, 1], 60).table
    assert 0 < table.kl_to_law[0] < 0.5


def made(final, diverged=(-1, -1, -1, -1)):
    rates = np.array([0.1, 0.1, 1.0, 1.0])
    nll = np.array(final, float)[:, None]
    return Trained(rates, np.array([0, 1, 0, 1]), np.array([9]), nll, nll, np.zeros(4, int), np.array(diverged), None)


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
    ):
        with pytest.raises(LabError, match=message):
            race(["nll"], SOURCE, "bigram", **arguments)


def test_progress_counts_the_steps_of_each_loss():
    calls = []
    race(["nll", LOSSES["mae"]], SOURCE, "bigram", [0.1], [0], 4, lambda *call: calls.append(call), blocks=2)
    assert calls == [("nll", 2, 4), ("nll", 4, 4), ("mae", 2, 4), ("mae", 4, 4)]
