"""What a head costs, compiled for given shapes and a mesh, and never run: memory and traffic by the compiler's own account."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xentlab.checks import checked
from xentlab.contract import LabError, Loss
from xentlab.linear import linear_loss
from xentlab.linear.form import stream_of
from xentlab.linear.plan import counted, explain_plan
from xentlab.losses.likelihood import nll

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Cost:
    """One device's share of value and gradient: head ("stream", "tokens", "naive"), bytes, matrix products, FLOPs.

    temporary_bytes and output_bytes are XLA's, for the backend it was compiled for; output is loss and gradients. flops are the
    products', 2 N D V each. sent: bytes that the device sends in each kind of collective, rings assumed.
    """

    head: str
    taken_by_auto: bool
    temporary_bytes: int
    output_bytes: int
    products: int
    flops: int
    sent: Mapping[str, int]


def head_costs(
    tokens: int,
    features: int,
    vocab: int,
    loss: Loss = nll,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    begun: Callable[[str], None] = lambda head: None,
) -> list[Cost]:
    """The cost of each plan that can run this loss, and of the naive head; `begun` is told before each is compiled.

    The naive head is loss(hidden @ weight, targets).mean() under jit, whose sharding XLA works out. Raises `LabError` as
    `linear_loss` does.

    >>> {cost.head: cost.products for cost in head_costs(64, 8, 512)}
    {'stream': 4, 'tokens': 3, 'naive': 3}
    """
    if min(tokens, features, vocab) < 1:
        raise LabError(f"tokens, features and vocabulary are counts of at least 1; got {tokens}, {features} and {vocab}.")
    counted(tokens, vocab)
    checked(loss, vocab)
    layout = tuple(mesh.shape.get(axis, 1) if mesh else 1 for axis in ("data", "model"))
    check_evenly(tokens, vocab, layout)
    taken = explain_plan(tokens, features, vocab, loss, dtype, layout=layout).name
    heads = {
        plan: lambda h, w, y, plan=plan: linear_loss(h, w, y, loss=loss, plan=plan, mesh=mesh)
        for plan in (("stream", "tokens") if stream_of(loss) else ("tokens",))
    }
    heads["naive"] = lambda h, w, y: jnp.mean(loss(h @ w, y))
    found = []
    for name, head in heads.items():
        begun(name)
        compiled = _compiled(head, mesh, tokens, features, vocab, dtype)
        memory = compiled.memory_analysis()
        # A naive head's products are the tokens plan's: logits, and two ways back.
        plan = explain_plan(tokens, features, vocab, loss, dtype, "tokens" if name == "naive" else name, layout=layout)
        sizes = int(memory.temp_size_in_bytes), int(memory.output_size_in_bytes)
        found.append(Cost(name, name == taken, *sizes, plan.products, plan.flops, collectives(compiled.as_text())))
    return found


def check_evenly(tokens: int, vocab: int, layout: Sequence[int]) -> None:
    """Raises `LabError` for tokens and classes that do not lie evenly on `layout`, the devices that share each."""
    for count, devices, what in zip((tokens, vocab), layout, ("tokens", "classes"), strict=True):
        if count % devices:
            whole = -(-count // devices) * devices
            raise LabError(f"{count} {what} cannot lie evenly on {devices} devices; take a multiple of that, {whole} say.")


def _compiled(head, mesh, tokens, features, vocab, dtype):
    shapes = [((tokens, features), dtype), ((features, vocab), dtype), ((tokens,), jnp.int32)]
    shaped = [jax.ShapeDtypeStruct(*each) for each in shapes]
    run = jax.value_and_grad(head, (0, 1))
    if mesh is None:
        return jax.jit(run).lower(*shaped).compile()
    data, model = ((axis if axis in mesh.axis_names else None) for axis in ("data", "model"))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    given = (place(data), place(None, model), place(data))
    return jax.jit(run, in_shardings=given, out_shardings=(place(), given[:2])).lower(*shaped).compile()


def collectives(module: str) -> dict[str, int]:
    """Bytes that one device sends in each kind of collective, from a compiled module's text, loops by their turns.

    Rings are assumed: of n devices, an all-reduce of b bytes sends 2 b (n - 1) / n, an all-gather to b bytes, an all-to-all
    or a reduce-scatter of b bytes b (n - 1) / n, a permute b.
    """
    bodies, entry, name = {}, None, None
    for line in module.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            bodies[name].append(line)
    total: dict[str, int] = {}

    def count(name, times):
        for line in bodies.get(name, ()):
            operation = re.search(r" = (.*?) ([a-z\-]+)\(", line)
            if not operation:
                continue
            kind = operation[2].removesuffix("-start")
            if kind in COLLECTIVES:
                sizes = _sizes(operation[1])
                if operation[2] == "all-gather-start":  # of operands, then of results
                    sizes = sizes[len(sizes) // 2 :]
                elif operation[2] == "collective-permute-start":  # and what it waits by
                    sizes = sizes[1:2]
                total[kind] = total.get(kind, 0) + times * _sent(kind, sum(sizes), line)
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line) if kind == "while" else None
            for called in re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
                count(called, times * (int(trips[1]) if trips else 1))

    count(entry, 1)
    return total


def _sizes(shape):
    """The bytes of each array of a shape."""
    sizes = []
    for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape):
        bits = int(re.search(r"\d+$", dtype)[0]) if dtype != "pred" else 8
        sizes.append(math.prod(map(int, filter(None, dims.split(",")))) * bits // 8)
    return sizes


def _sent(kind, size, line):
    devices = _group(line)
    share = {"all-reduce": 2 * (devices - 1) / devices, "reduce-scatter": devices - 1, "collective-permute": 1}
    return round(size * share.get(kind, (devices - 1) / devices))


def _group(line):
    """Devices in each group of a collective: XLA writes the groups in full, as an array's shape, or by a mesh's axes."""
    full = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if full:
        return full[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    return 2  # a permute names pairs
