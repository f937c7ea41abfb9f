"""Commands that look at losses: list, show, gradients, budget, plan, audit."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import pathlib
import sys
import time
from typing import Any

from xentlab import console
from xentlab.cli.writing import finish
from xentlab.commands import Audit, Budget, Gradients, List, Plan, Show
from xentlab.contract import LabError, Loss
from xentlab.names import expanded

QUICK = (0.9, 0.1, 1e-6)


def run_list(command: List) -> None:
    """The catalogue."""
    from xentlab.catalogue import LOSSES, installed_losses

    rows = [_facts(name, loss) for name, loss in LOSSES.items()]
    installed = {name: point.value for name, point in installed_losses().items()}
    others = {name: value for name, value in installed.items() if name not in LOSSES}
    if command.format == "table":
        columns = ("loss", "family", "settings", "proper", "calibrated", "convex", "bounded", "low_p_even", "low_p_one")
        console.print_table([{column: row[column] for column in columns} for row in rows])
        print("proper: the expected loss is least at the truth, read by a softmax, or by the loss's own link, or not.")
        print("calibrated: the likeliest class there is the truth's.")
        print("low_p: the limit of |dL/dz_y| as p -> 0 (V = 16), with even rivals, and with one that rises.")
        print("More on one of them: xentlab show LOSS. A loss of your own: ./file.py:function, wherever a name may stand.")
        for name, value in others.items():
            print(f"installed: {name} ({value})")
        for name in sorted(installed.keys() & LOSSES.keys()):
            print(f"installed, and hidden by the catalogue's own: {name} ({installed[name]})")
    else:
        console.print_rows([*rows, *({"loss": name, "family": value} for name, value in others.items())], command.format)


def run_show(command: Show) -> None:
    """One loss."""
    from xentlab.audit import claims
    from xentlab.catalogue import resolve
    from xentlab.contract import name_of, settings_of, unwrapped, whole

    loss = resolve(command.loss, vocab=whole(command.vocab, 2, f"a vocabulary has two classes or more; got {command.vocab}."))
    function = inspect.unwrap(unwrapped(loss)[0])
    row = _facts(name_of(loss), loss)
    if settings_of(loss) and claims(loss):
        row["facts"] = "those of the default settings; xentlab audit asks of these"
    try:
        row["code"] = f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):
        row["code"] = "not known"
    if command.format != "table":
        console.print_rows([row], command.format)
        return
    console.print_facts(row, inspect.getdoc(function) or "")


def _facts(name: str, loss: Any) -> dict[str, Any]:
    from xentlab.contract import facts_of, low_p_claim, settings_of, unwrapped

    (function, places, _), facts = unwrapped(loss), facts_of(loss)
    parameters = list(inspect.signature(function).parameters.values())
    del parameters[len(places) : len(places) + 2]  # the logits and the targets
    settings = {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} | settings_of(loss)
    package, _, family = getattr(function, "__module__", "").rpartition(".")

    return {
        "loss": name,
        "family": family if package == "xentlab.losses" else "",
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()),
        "formula": facts.formula,
        "gradient": facts.gradient,
        "link": facts.link_name,
        "proper": facts.proper,
        "calibrated": facts.calibrated,
        "convex": facts.convex,
        "bounded": facts.bounded,
        "shift": facts.shift,
        "local": facts.local,
        "low_p_even": low_p_claim(loss, "even", 16),
        "low_p_one": low_p_claim(loss, "one", 16),
        "stream": ", ".join(inspect.signature(facts.stream).parameters) if facts.stream else "",
        "infinite_at": ", ".join(facts.infinite),
        "source": facts.source,
        "note": facts.note,
    }


def run_gradients(command: Gradients) -> None:
    """Profiles."""
    import numpy as np

    from xentlab.gradients import gradient_profile, path_logits

    begun = time.perf_counter()
    probabilities = QUICK if command.quick and command.probabilities == Gradients.probabilities else command.probabilities
    frame = gradient_profile(command.losses, probabilities, command.vocab, command.rivals)
    finish(dataclasses.replace(command, probabilities=probabilities), {"profiles": frame}, "profiles", begun)
    p = frame.p.unique()
    out_of_reach = p[np.isnan(path_logits(p, command.vocab, "one")[0]).any(axis=1)]
    reached = frame[(frame.rivals == "even") | ~frame.p.isin(out_of_reach)]
    if len(reached) < len(frame):
        print(f"nan: with one rival rising, p cannot reach 1/(V - 1), V = {command.vocab}.", file=sys.stderr)
    for loss, rows in reached[reached[["value", "dvalue_dlogit"]].isna().any(axis=1)].groupby("loss", sort=False):
        where = ", ".join(f"{p:g}" for p in dict.fromkeys(rows.p))
        print(f"{loss} is no number at p = {where}: `xentlab audit` says more.", file=sys.stderr)


def run_budget(command: Budget) -> None:
    """Where a batch's gradient goes."""
    from xentlab.gradients import BINS, are_probabilities, gradient_budget, load_batch

    begun = time.perf_counter()
    logits, targets = load_batch(command.file, command.targets)
    frame = gradient_budget(command.losses, logits, targets, command.bins or BINS)
    read = [_batch(path) for path in (command.file, command.targets) if path and command.out]
    finish(command, {"budgets": frame}, "budgets", begun, read)
    if are_probabilities(logits):
        print("Each row lies in [0, 1] and sums to 1. Are these probabilities? Losses take logits: their log.", file=sys.stderr)
    for loss, rows in frame.groupby("loss", sort=False):
        if rows.share_of_gradient.isna().all():
            where = ", ".join(f"{p:g}" for p in rows.p_low[(rows.tokens > 0) & ~(rows.gradient < math.inf)])
            print(
                f"{loss} has no shares: its gradient is infinite or no number in the bins from p = {where}, as a logit of -inf "
                "may make it: `xentlab audit` says more.",
                file=sys.stderr,
            )


def _batch(path: pathlib.Path) -> dict[str, str]:
    """What a record says of a file of logits: where it was, and by what hash another one is told from it."""
    path = expanded(path).absolute()
    with path.open("rb") as file:
        return {"kind": "batch", "path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def run_plan(command: Plan) -> None:
    """What the head costs."""
    from xentlab.catalogue import resolve
    from xentlab.linear import explain_plan
    from xentlab.linear.costs import check_evenly, head_costs
    from xentlab.mesh import make_mesh, parse_mesh

    axes = parse_mesh(command.mesh)
    shape = (command.tokens, command.features, command.vocab)
    layout = (axes.get("data", 1), axes.get("model", 1))
    check_evenly(command.tokens, command.vocab, layout)  # before so many devices are made
    mesh = make_mesh(axes)
    loss = resolve(command.loss, check=False)  # whose file may start JAX, which has its devices by then
    begun = lambda head: print(f"compiling: {head}", file=sys.stderr)
    costs = head_costs(*shape, loss, command.dtype, mesh, begun)
    if command.format != "table":
        rows = [dataclasses.asdict(cost) for cost in costs]
        if command.format == "csv":  # a cell is one number
            rows = [row | {f"sent_{kind.replace('-', '_')}": size for kind, size in row.pop("sent").items()} for row in rows]
        console.print_rows(rows, command.format)
        return
    kinds = sorted({kind for cost in costs for kind in cost.sent})
    megabytes = lambda count: f"{count / 1e6:,.3g}" if count < 1e3 * 1e6 else f"{count / 1e6:,.0f}"
    rows = []
    for cost in costs:
        row = {"head": cost.head, "temporary MB": megabytes(cost.temporary_bytes), "output MB": megabytes(cost.output_bytes)}
        row |= {"products": str(cost.products), "GFLOP": f"{cost.flops / 1e9:,.3g}"}
        rows.append(row | {f"{kind} MB": megabytes(cost.sent.get(kind, 0)) for kind in kinds})
    console.print_table(rows)
    taken = explain_plan(*shape, loss, command.dtype, layout=layout)
    print(f"auto takes {taken.name}: {taken.why}; {taken.tiles[0]} tokens a chunk, {taken.tiles[1]} classes a tile.")
    held = {cost.head: cost.temporary_bytes for cost in costs}
    plans = [plan for plan in ("stream", "tokens") if plan in held]
    reckoned = {plan: explain_plan(*shape, loss, command.dtype, plan, layout=layout).temporary_bytes for plan in plans}
    least = min(plans, key=held.get)
    if reckoned[taken.name] <= reckoned[least] and held[least] < 0.98 * held[taken.name]:
        guessed = " and ".join(f"{megabytes(reckoned[plan])} MB for {plan}" for plan in plans)
        print(f'It goes by an estimate, {guessed}; as compiled, above, {least} holds less: plan="{least}" takes it.')
    if held["naive"] < held[taken.name]:
        print("The naive head holds less here: of so few logits a device, a loop's own arrays are more.")
    import jax

    where = f"in {command.dtype}, as compiled for {jax.default_backend()}"
    print(f"One device's share of value and gradient {where}; nothing was run.")


def run_audit(command: Audit) -> None:
    """Verdicts."""
    from xentlab.audit import FAILED, audit
    from xentlab.catalogue import LOSSES, resolve

    if command.all and command.losses:
        raise LabError(f"--all is every loss of the catalogue; leave it out, or {', '.join(command.losses)}.")
    names = tuple(LOSSES) if command.all else command.losses
    if not names:
        raise LabError("no losses given; name some, or take --all.")
    losses = [resolve(name, check=False) for name in names]
    audits = []
    with console.progress() as tell:
        for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
            tell(f"audit of {name}", i, len(losses))
            audits.append(audit(loss, command.seed, command.vocab))
    _print_audits(command, audits, losses)
    if any(each.verdicts["elementwise"].evidence.startswith(FAILED) for each in audits):
        sys.exit(1)


def _print_audits(command: Audit, audits: list[Any], losses: list[Loss]) -> None:
    from xentlab.audit import as_json, claims

    if command.format == "json":
        console.print_json(as_json(audits))
        return
    if command.format == "csv":
        console.print_rows([{"loss": each.loss, **_cells(each)} for each in audits], "csv")
        return
    if len(audits) > 1:
        rows = [
            {"loss": each.loss, **{name: console.verdict_text(verdict.value) for name, verdict in each.verdicts.items()}}
            for each in audits
        ]
        columns = [name for name in rows[0] if name not in console.LONG]
        if len(rows) > 4:
            console.print_table([{name.replace("_", "\n"): row[name] for name in columns} for row in rows])
        else:
            console.print_table([{"verdict": name, **{row["loss"]: row[name] for row in rows}} for name in columns[1:]])
        _print_claims(audits, losses)
        for each in audits:
            if (first := each.verdicts["elementwise"]).value == "undecided":
                print(f"{each.loss}: {first.evidence}")
        print('low_p_limit, max_error, evidence, witnesses: one loss at a time, or --format json. "?" is undecided.')
        return
    console.print_audit(audits[0])
    if claims(losses[0]):
        print()
        _print_claims(audits, losses)


def _cells(found: Any) -> dict[str, Any]:
    """An audit's verdicts, one value a cell: what has several, an error by dtype say, in as many columns."""

    def cells(name, value):
        if not isinstance(value, dict):
            return {name: value}
        return {key: each for part in value for key, each in cells(f"{name}_{part}", value[part]).items()}

    return {key: each for name, verdict in found.verdicts.items() for key, each in cells(name, verdict.value).items()}


def _print_claims(audits: list[Any], losses: list[Loss]) -> None:
    """Whether what was found of losses is what is claimed of them."""
    from xentlab.audit import claims, disagreements, has_facts

    pairs = list(zip(audits, losses, strict=True))
    differ = {each.loss: said for each, loss in pairs if (said := disagreements(each, loss))}
    claimed = [each.loss for each, loss in pairs if claims(loss) and has_facts(loss)]
    others = [each.loss for each, loss in pairs if claims(loss) and not has_facts(loss)]
    if claimed and not differ:
        whose = ", ".join(claimed) if len(claimed) < 4 else f"{len(claimed)} of these losses"
        print(f"What is claimed of {whose} is what was found.")
    for name, said in differ.items():
        print(f"{name}: {'; '.join(said)}")
    if others:
        print(f"What is claimed of {', '.join(others)} is claimed at other settings.")
