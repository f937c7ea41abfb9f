"""What is said of numbers, against frames small enough to read them off by eye."""

import math

import pandas as pd
import pytest

from xentlab import reading
from xentlab.scoreboard.reading import front, least, sentences

INF, NAN = math.inf, math.nan


def profiles(even, one=None, order=0.0):
    """A profile frame with |dL/dz_y| at 1e-6, times (p / 1e-6)**order at p = 1e-3; both paths alike, unless one is given."""
    rows = [
        {"loss": loss, "rivals": rivals, "p": p, "dvalue_dlogit": -size * (p / 1e-6) ** order, "dvalue_dp": -size / p}
        for rivals, sizes in (("even", even), ("one", one or even))
        for loss, size in sizes.items()
        for p in (1e-3, 1e-6)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("size", "said"), [(0.6, False), (0.995, True), (1.0, True)])
def test_only_what_pulls_the_same_pulls_just_as_hard(size, said):
    assert ("other pulls just as hard." in " ".join(reading.gradients(profiles({"nll": 1, "other": size})))) == said


@pytest.mark.parametrize(
    ("order", "said"),
    [(0.0, "holds"), (0.002, "holds"), (0.05, "falls slowly with p"), (1, "goes to 0 with p"), (-0.1, "still grows")],
)
def test_a_pull_that_goes_to_0_slowly_does_not_hold(order, said):
    assert f"{said} for nll (0.5)" in reading.gradients(profiles({"nll": 0.5}, order=order))[0]


def test_how_p_became_small_matters_only_where_the_paths_differ():
    assert "How p became small" not in " ".join(reading.gradients(profiles({"nll": 1})))
    assert reading.gradients(profiles({"nll": 1}, {"nll": 0.5}))[-1].startswith(
        "How p became small matters for nll (1 against 0.5):"
    )


def test_unlikely_tokens_are_those_up_to_the_edge_and_both_ends_are_named():
    bins = {"source": "s", "p_low": [0.0, 0.1], "p_high": [0.1, 1.0], "share_of_tokens": [0.3, 0.7]}
    shares = {"nll": [0.6, 0.4], "brier": [0.2, 0.8]}
    rows = pd.concat([pd.DataFrame(bins | {"loss": loss, "share_of_gradient": each}) for loss, each in shares.items()])
    assert reading.budgets(rows) == [
        "On s, 30% of the tokens had p below 0.1. They get 60% of nll's gradient and 20% of brier's."
    ]


# A race's row beside what a test gives of it.
REST = {
    "source": "s",
    "uniform_nll": 5.5,
    "tempered_nll": NAN,
    "best_rate": 0.1,
    "rate_at_edge": False,
    "diverged": 0,
    "smoothing": 0.0,
}


def test_the_least_is_told_in_nats_and_in_bits_and_the_most_is_another_s():
    rows = pd.DataFrame({"loss": ["nll", "brier", "mae"], "test_nll": [1.0, 2.0, 3.0]})
    rows["bits_per_byte"] = rows.test_nll / math.log(2)
    assert reading.races(rows.assign(beyond_law=NAN, **REST)) == [
        "On s the least test NLL is nll's, 1.000 nats a token (1.44 bits a byte). The most is mae's, 3.000."
    ]


@pytest.mark.parametrize(
    ("nll", "said"),
    [
        ({"brier": 2.0}, "test NLL of brier is 2.000 nats a token."),
        ({"nll": 2.0, "twin": 2.0}, "test NLL of nll and twin is 2.000 nats a token."),
        (
            {"twin": 2.0, "nll": 2.0 + 1e-7, "mae": 3.0},
            "least test NLL is twin's and nll's, 2.000 nats a token. The most is mae's, 3.000.",
        ),
        (
            {"nll": 2.0, "mae": 3.0, "twin": 3.0},
            "least test NLL is nll's, 2.000 nats a token. The most is mae's and twin's, 3.000.",
        ),
        ({"mae": 2.0, "nll": 3.0}, "least test NLL is mae's, 2.000 nats a token; nll itself is 1.000 behind."),
        ({"nll": 2.0, "mae": 2.0001}, "least test NLL is nll's, 2.000 nats a token. The most is mae's, by 1.0e-04 more."),
    ],
)
def test_what_is_equal_shares_its_place_and_one_alone_has_none(nll, said):
    rows = pd.DataFrame({"loss": list(nll), "test_nll": list(nll.values())}).assign(bits_per_byte=NAN, beyond_law=NAN, **REST)
    assert reading.races(rows) == [f"On s the {said}"]


def test_what_costs_less_than_its_law_asks_is_told_beyond_chance_alone():
    rows = pd.DataFrame({"loss": ["nll", "mae", "own"], "test_nll": [2.0, 3.0, 0.1], "beyond_law": [NAN, 49.0, 1900.0]})
    assert [each for each in reading.races(rows.assign(bits_per_byte=NAN, **REST)) if "law" in each] == [
        "On s the test tokens cost less than the law that drew them asks, by more than chance gives: own (by 1,900 nats in "
        "all). So does no prediction of what it has not seen: a model or a link of one's own reads what it is to predict, the "
        "test part is known to it, or the source's law is not the one that drew them."
    ]


def test_what_one_temperature_cures_is_not_said_to_pull_nowhere():
    rest = REST | {"uniform_nll": 2.0, "tempered_nll": [1.5, 2.0]}
    rows = pd.DataFrame({"loss": ["hard", "still"], "test_nll": [9.0, 2.0]}).assign(bits_per_byte=NAN, beyond_law=NAN, **rest)
    misread, pulls, _ = reading.races(rows)
    assert misread.startswith(
        "On s hard ended no better than a uniform guess, 2.000 nats: one temperature brings hard to 1.500"
    )
    assert pulls.startswith("On s still ended no better")
    assert "does it pull towards the target?" in pulls


def test_an_interval_s_numbers_are_told_apart():
    assert reading.all_seen(0.15876, 0.15847, 0.15905) == ["+0.1588", "+0.1585", "+0.1590"]
    assert reading.all_seen(12.3456, 12.3455, 12.3457) == ["+12.3456", "+12.3455", "+12.3457"]
    assert reading.all_seen(-0.00123, 0.0, 1e-5) == ["-1.2e-03", "+0.0e+00", "+1.0e-05"]


def test_of_few_losses_one_seed_of_a_pair_speaks_for_that_pair_alone():
    rows = pd.DataFrame({"loss": ["b", "c"], "seeds": [3, 1], "difference": 0.5, "tells_apart": [True, False]})
    (said,) = reading.pairs(rows.assign(source="s", against="nll", metric="test_nll", low=0.4, high=0.6))
    assert "over 3 seeds: behind it b" in said


def test_less_is_ahead_and_more_is_behind():
    rows = pd.DataFrame({"loss": ["a", "b", "c"], "difference": [-0.5, 0.0, 0.5], "tells_apart": [True, False, True]})
    rows = rows.sample(frac=1, random_state=0).assign(source="s", against="nll", seeds=3, low=-1.0, high=1.0)
    raw, count, tempered = reading.pairs(pd.concat([rows.assign(metric=name) for name in ("test_nll", "tempered_nll")]))
    ends = "[-1.000, +1.000]"
    assert raw.endswith(
        f"over 3 seeds: ahead of it a (-0.500, {ends}); not told from it b (+0.000, {ends}, which covers 0); "
        f"behind it c (+0.500, {ends})."
    )
    assert "these are 3 intervals" in count
    assert tempered.endswith("against nll: ahead of it a (-0.500); not told from it b (+0.000); behind it c (+0.500).")


def test_a_temperature_helps_where_less_is_left_costs_where_more_is_and_else_changes_nothing():
    rows = {"loss": ["nll", "mae", "brier"], "test_nll": [2.0, 1.0, 3.0], "tempered_nll": [1.5, 1.2, 3.001]}
    assert reading.temperatures(
        pd.DataFrame(rows | {"temperature": [2.0, 0.5, 1.0], "temperature_at_edge": [True, False, False]}).assign(source="s")
    ) == [
        "On s one temperature, fitted on validation, helps nll (2.000 to 1.500 nats at 2, a seed at the end of what is tried).",
        "On s that temperature costs mae (1.000 to 1.200 nats at 0.5) on test.",
        "On s one temperature changes the test NLL of brier by no more than .01.",
    ]


# A board of which only what a test gives says anything.
BLANK = {"read_through": "softmax(z)", "proper_through": "softmax", "tokens_needed": NAN, "bias": 0.0, "simulated": NAN}
BLANK |= {"finite_float32": True, "finite_float16": True, "low_p_even": 1.0, "low_p_one": 1.0, "escape_steps": 10.0}
BLANK |= {"low_p_order": NAN}
BLANK |= dict.fromkeys(("lipschitz", "convex", "strictly_proper", "local"), False) | {"calibrated": True}


def board(losses, codes=None, **columns):
    """What is said of a scoreboard."""
    table = pd.DataFrame(columns | {"loss": losses})
    table = table.assign(**{name: value for name, value in BLANK.items() if name not in columns})
    return sentences(table, pd.DataFrame() if codes is None else codes)


def test_a_simulation_agrees_where_its_interval_holds_the_theory():
    trial = {"theory": [1.0, 1.5], "simulated": [1.0, 2.0], "simulated_low": [0.9, 1.8], "simulated_high": [1.1, 2.2]}
    said = " ".join(board(["nll", "brier"], tokens_needed=[1.0, 1.5], **trial))
    assert "the interval covers the theory for nll." in said
    assert "off the theory for brier (2, not 1.5)." in said


def test_where_there_is_no_minimiser_nothing_is_said_of_tokens():
    said = board(["nll", "brier", "upside_down"], tokens_needed=[1.0, NAN, NAN], bias=[0.0, 0.2, NAN])
    assert "No single minimiser was found for upside_down, so nothing is known of tokens." in said
    assert sum("upside_down" in each for each in said[:3]) == 1


def test_a_coded_file_is_compared_with_its_cross_entropy_in_per_cent():
    codes = {"loss": ["nll", "mae"], "bits": [200, 300], "model_bits": [196.0, 297.0], "bits_per_token": [2.0, 3.0]}
    codes = pd.DataFrame(codes | {"source": "s", "tokens": 100, "floor_bits_per_token": NAN})
    said = " ".join(board(["nll", "mae"], codes))
    assert "nll wrote the least, 2.0000 bits a token, mae the most, 3.0000." in said
    assert "cross entropy differ by at most 2%" in said
    assert "tokens; nll wrote 2.0000 bits a token. Each" in " ".join(board(["nll"], codes[:1]))
    endless = " ".join(board(["nll"], codes[:1].assign(model_bits=math.inf)))
    assert "bits a token." in endless
    assert "a cross entropy is a file size" not in endless


def test_what_is_not_settled_is_not_called_finite():
    sentences = board(["nll", "open", "bad"], finite_float16=[True, "undecided", False])
    for start, name in (("Finite in float32 and float16", "nll"), ("Not settled", "open"), ("Not finite", "bad")):
        sentence = next(each for each in sentences if each.startswith(start))
        assert [each for each in ("nll", "open", "bad") if each in sentence.split(". ")[0]] == [name]


def test_a_pull_is_gone_only_where_it_is_gone_on_both_paths():
    losses, even = ["nll", "brier", "mae", "grow"], [1.0, 0.0, 0.0, INF]
    said = " ".join(board(losses, low_p_even=even, low_p_one=[1.0, 0.0, 0.5, 1.0], escape_steps=[10.0, INF, 20.0, 30.0]))
    assert "teaches nothing holds for brier: the pull goes to 0 with p." in said
    assert "The pull of grow grows without bound." in said
    assert "alone keeps its pull" not in said
    assert "Steps out of a confidently wrong start, each at its best rate: nll 10, mae 20 and grow 30." in said
    assert "At no rate that was tried did brier get out." in said
    said = " ".join(board(["brier", "gone", "slow"], low_p_even=0.0, low_p_one=0.0, low_p_order=[1.0, NAN, 0.0]))
    assert "teaches nothing holds for brier and gone: the pull goes to 0 with p." in said
    assert "For slow it holds in the limit alone: the pull falls slowly with p, see its order." in said
    said = " ".join(board(["brier", "weighed", "open"], escape_steps=INF, calibrated=[True, False, "undecided"]))
    assert "did open come to 95% of the best accuracy and stay. Whether it is calibrated is not settled" in said
    assert "At no rate that was tried did brier get out." in said
    assert "did weighed come to 95% of the best accuracy and stay. Not calibrated, such a loss may have its own optimum" in said


def test_a_conclusion_is_of_losses_that_are_settled_and_of_more_than_one():
    all_of_it = dict.fromkeys(("lipschitz", "convex", "strictly_proper", "local"), True)
    concludes = lambda said: any("on this board" in each.lower() for each in said)
    assert not concludes(board(["nll"], **all_of_it))
    cast = board(["nll", "cast"], lipschitz=[True, "undecided"], convex=True, strictly_proper=[True, "undecided"], local=True)
    assert not concludes(cast)
    three = board(["nll", "cast", "none"], **all_of_it | {"lipschitz": [True, "undecided", False]})
    assert three[-1].startswith("What cross entropy alone on this board combines")
    neither = "No loss on this board has all of this: that it does not vanish at low p, has a bounded gradient, "
    assert board(["nll", "brier"])[-1].startswith(neither)


def test_of_a_loss_that_is_not_settled_tokens_are_not_known_either():
    said = board(["nll", "cast"], tokens_needed=[1.0, NAN], bias=[0.0, NAN], strictly_proper=[True, "undecided"])
    assert "Nothing is known of tokens for cast: `xentlab audit` says why." in said
    assert not any("minimiser" in each for each in said)


def test_what_else_keeps_its_pull_is_named():
    assert "That cross entropy alone keeps its pull does not hold: hinge keeps it too." in board(["nll", "hinge"])


def test_who_is_first_is_told_from_the_rest_by_intervals_or_by_a_tenth():
    frame = pd.DataFrame({"loss": ["nll", "brier", "mae"], "tokens_needed": [1.0, 1.66, INF], "error": [1.94, 1.95, 3.9]})
    bits = {"bits": [6.5, 6.6, 9.0], "bits_low": [4.4, 4.6, 8.7], "bits_high": [8.5, 8.4, 9.3]}
    assert front(frame.assign(**bits), ["tokens_needed", "bits", "error"]) == (
        "First at each door, as far as intervals or a tenth tell: tokens needed nll, bits nll and brier level, error nll and "
        "brier level. Cross entropy is first alone at 1 of the 3, level with others at 2."
    )
    turned = frame.assign(error=[1.95, 1.94, 3.9], far=[2.0, 1.0, 3.0])
    assert front(turned, ["tokens_needed", "far"]).endswith("first alone at 1 of the 2.")
    assert front(turned, ["error"]).endswith(
        "error brier and nll level. Cross entropy is first alone at 0 of the 1, level with others at 1."
    )
    number = pd.Series([6.5, 6.6], ["nll", "brier"])
    assert least(number, number - 0.01, number + 0.01) == ["nll"]  # within a tenth, and yet told apart


def test_where_no_token_is_unlikely_no_share_is_told():
    rows = {"p_low": [0.0, 0.1], "p_high": [0.1, 1.0], "share_of_tokens": [0.0, 1.0], "share_of_gradient": [0.0, 1.0]}
    frame = pd.concat([pd.DataFrame(rows).assign(source="s", loss=name) for name in ("nll", "mae")])
    assert reading.budgets(frame) == ["On s no token had p below 0.1."]
