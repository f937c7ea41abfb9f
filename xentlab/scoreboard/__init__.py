"""The scoreboard: every loss a row, the four reasons for cross entropy as numbers, each computed.

Probability: tokens needed relative to maximum likelihood. Information: bytes that a range coder wrote. Numerics: error per
dtype. Optimisation: gradient at low probability, and steps out of a confidently wrong start.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from xentlab.audit import Audit, audit
from xentlab.audit.numerics import DTYPES
from xentlab.catalogue import resolve, resolve_all
from xentlab.coding import decode, encode
from xentlab.contract import LabError, Loss, facts_of
from xentlab.defaults import Progress, quiet
from xentlab.memory import usable_cores
from xentlab.runs import write_bytes
from xentlab.scoreboard.efficiency import efficiency, make_truth, simulate, tokens_needed
from xentlab.scoreboard.escape import wrong_start
from xentlab.sources import Source
from xentlab.stages import StagedRace

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Scoreboard", "code_lengths", "scoreboard"]

DRAWS = (0, 1, 2)  # of the truth's weights
REPLICATES = 8  # fits a size in the trial of the theory
LANES = 24
MOST_TOKENS = 24_576  # that are coded: all of the test part of a standard race


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """What the four doors say, as tidy frames.

    table: one row a loss. Probability: bias (nats), tokens_needed with _low and _high over draws of the truth, simulated
    with _low and _high (95%, on the first draw), and theory, what that draw is to show. Numerics: error_<dtype> and
    gradient_error_<dtype>, finite_<dtype>. Optimisation: low_p_even, low_p_one, low_p_order, escape_steps, escape_rate and
    escape_tried. Beside them read_through, the link that the loss declares, and the audit's strictly_proper,
    proper_through, calibrated, convex, lipschitz and local.
    codes: information, one row a source and loss, as `code_lengths` gives it. audits: each loss's audit.
    """

    table: pd.DataFrame
    codes: pd.DataFrame
    audits: dict[str, Audit]


def scoreboard(
    losses: Iterable[str | Loss],
    races: Sequence[StagedRace] = (),
    seed: int = 0,
    replicates: int = 0,
    folder: pathlib.Path | None = None,
    progress: Progress = quiet,
) -> Scoreboard:
    """Asks the four questions of every loss.

    races: finished races of these losses, whose models are coded with; without any the door of information stays shut.
    replicates: fits a size for the trial of the first door by simulation; 0 for theory alone. folder: where the coded files
    are kept. progress(what, done, total) is called after each part.
    """
    import pandas as pd

    found = resolve_all(losses)
    truths = [make_truth(seed=draw) for draw in DRAWS]
    what = "audit, tokens needed, wrong starts, coding"
    progress(what, 0, len(found))
    rows, audits = [], {}
    # Most of it is compilation, which keeps one core busy: a task a core. What others wait for is asked for first.
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        nll = resolve("nll")
        trial = lambda: simulate(nll, truths[0], truths[0].weights, replicates=replicates, seed=seed) if replicates else None
        reference = pool.submit(trial)
        coding = [pool.submit(code_lengths, each.race.predictors, each.stage.source, folder) for each in races]
        doors = lambda loss: (audit(loss, seed), _trained_doors(loss, truths, reference.result(), replicates, seed))
        for (name, _), (audited, numbers) in zip(found.items(), pool.map(doors, found.values()), strict=True):
            audits[name] = audited
            rows.append({"loss": name, "read_through": facts_of(found[name]).link_name, **_from_audit(audited), **numbers})
            progress(what, len(rows), len(found))
        codes = [each.result() for each in coding]
    return Scoreboard(pd.DataFrame(rows), pd.concat(codes, ignore_index=True) if codes else pd.DataFrame(), audits)


def _trained_doors(loss: Loss, truths: list, reference: Any, replicates: int, seed: int) -> dict[str, float]:
    """The first door and the steps of the fourth."""
    escape = wrong_start(loss)
    steps = {"escape_steps": float(escape.steps), "escape_rate": escape.rate, "escape_tried": escape.high}
    return {**_probability(loss, truths, reference, replicates, seed), **steps}


def _probability(loss: Loss, truths: list, reference: Any, replicates: int, seed: int) -> dict[str, float]:
    each = [efficiency(loss, truth) for truth in truths]
    needed = np.array([one.tokens_needed for one in each])
    row = {
        "bias": float(np.mean([one.bias for one in each])),
        "tokens_needed": float(needed.mean()),
        "tokens_needed_low": float(needed.min()),
        "tokens_needed_high": float(needed.max()),
        "theory": float(needed[0]),
    }
    trial = (math.nan,) * 3
    if replicates and np.isfinite(needed[0]):
        if loss is resolve("nll"):  # against the theory itself, for against its own fits it is 1
            trial = tokens_needed(reference, each[0].excess)
        else:
            trials = simulate(loss, truths[0], each[0].weights, replicates=replicates, seed=seed)
            trial = tokens_needed(trials, reference)
    return {**row, **dict(zip(("simulated", "simulated_low", "simulated_high"), trial, strict=True))}


def _from_audit(found: Audit) -> dict[str, Any]:
    verdicts = {name: verdict.value for name, verdict in found.verdicts.items()}
    numbers = lambda value, keys: value if isinstance(value, dict) else dict.fromkeys(keys, math.nan)
    limits = numbers(verdicts["low_p_limit"], ("even", "one"))
    errors, finite = verdicts["max_error"], verdicts["finite"]
    row: dict[str, Any] = {}
    for dtype in DTYPES:
        error = errors[dtype] if isinstance(errors, dict) else {"value": math.nan, "gradient": math.nan}
        row[f"error_{dtype}"], row[f"gradient_error_{dtype}"] = error["value"], error["gradient"]
        row[f"finite_{dtype}"] = finite[dtype] if isinstance(finite, dict) else finite
    as_float = lambda value: math.nan if value is None or value == "undecided" else float(value)
    row |= {"low_p_even": as_float(limits["even"]), "low_p_one": as_float(limits["one"])}
    row |= {"low_p_order": as_float(verdicts["low_p_order"])}
    kept = ("strictly_proper", "proper_through", "calibrated", "convex", "lipschitz", "local")
    return row | {key: verdicts[key] for key in kept}


def code_lengths(predictors: Mapping[str, Callable], source: Source, folder: pathlib.Path | None = None) -> pd.DataFrame:
    """Codes a source's test part with each loss's model, decodes it, compares, and counts.

    predictors: by loss, a function of tokens [..., T] to probabilities [..., T, V], `Race.predictors` for one.

    One row a loss: source, loss, tokens, bits (of the payload), model_bits (the cross entropy of the same tokens),
    bits_per_token, bits_per_byte (of text), model_bits_per_token, floor_bits_per_token (a chain's entropy rate). With a
    folder the files are kept there as <source>-<loss>.coded. Raises `LabError` if the text does not come back.
    """
    import pandas as pd

    tokens = np.asarray(source.split("test"))[:MOST_TOKENS].astype(np.int32)
    sizes = None if source.token_bytes is None else int(np.asarray(source.token_bytes)[tokens].sum())
    floor = getattr(source, "entropy_rate", None)
    rows = []
    for name, predict in predictors.items():
        # Hundreds of calls on a few windows: a plain jit with the model closed over has the least to do for each.
        ask = jax.jit(lambda tokens, predict=predict: predict(tokens))
        coded = encode(ask, tokens, source.vocab, lanes=LANES)
        if folder is not None:
            kept = "".join(c if c.isalnum() or c in "_-." else "_" for c in f"{source.name}-{name}")
            coded_file = write_bytes(folder / f"{kept}.coded", coded.file).read_bytes()
        else:
            coded_file = coded.file
        if not np.array_equal(decode(ask, coded_file), tokens):
            raise LabError(f"what the model of {name} coded did not come back as it was: a fault of the lab, please report it.")
        rows.append(
            {
                "source": source.name,
                "loss": name,
                "tokens": len(tokens),
                "bits": coded.payload_bits,
                "model_bits": coded.model_bits,
                "bits_per_token": coded.payload_bits / len(tokens),
                "bits_per_byte": coded.payload_bits / sizes if sizes else math.nan,
                "model_bits_per_token": coded.model_bits / len(tokens),
                "floor_bits_per_token": math.nan if floor is None else floor / math.log(2),
            }
        )
    return pd.DataFrame(rows)
