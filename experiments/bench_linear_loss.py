"""How much does the head cost, beside the matrix products that it cannot do without and the head as anyone writes it?

Value and gradient in float32. All contestants run in turn, round after round; the table gives medians of their ratio to three
bare products in the same round, with the quartiles, and what XLA says of temporary memory. `--quick` takes the first shape.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from xentlab import LOSSES, at_target, linear_loss
from xentlab.contract import name_of
from xentlab.linear.logits import product
from xentlab.linear.reductions import stream_of
from xentlab.runs import new_folder, write_frame

SHAPES = ((1024, 256, 32_768), (2048, 512, 50_304), (4096, 512, 128_256))


def bare(hidden, weight, targets):
    """Logits, and two products of their size: what value and gradient need at the least."""
    z = product(hidden, weight, 1, 0)
    return jnp.sum(at_target(z, targets)), (product(z, weight, 1, 1), product(hidden, z, 0, 0))


def contestants(losses) -> dict:
    """Functions of hidden, weight and targets to (value, gradients), by name."""
    found = {"three bare products": bare}
    for name in losses:
        loss = LOSSES[name]
        naive = lambda h, w, y, loss=loss: jnp.mean(loss(h @ w, y))
        found[f"naive {name}"] = jax.value_and_grad(naive, (0, 1))
        for plan in ("tokens", "stream") if stream_of(loss) else ("tokens",):
            head = lambda h, w, y, loss=loss, plan=plan: linear_loss(h, w, y, loss=loss, plan=plan)
            found[f"{plan} {name_of(loss)}"] = jax.value_and_grad(head, (0, 1))
    return found


def run(losses=("nll", "brier", "hinge"), shapes=SHAPES, rounds: int = 7) -> pd.DataFrame:
    """A row a shape and contestant: ratio to the bare products (median, quartiles), milliseconds, temporary MB."""
    rows = []
    for tokens, features, vocab in shapes:
        rng = np.random.default_rng(0)
        arrays = [
            jnp.asarray(rng.normal(size=s) / features**0.25, jnp.float32) for s in ((tokens, features), (features, vocab))
        ]
        arrays.append(jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32))
        built = {name: jax.jit(each).lower(*arrays).compile() for name, each in contestants(losses).items()}
        seconds = {name: [] for name in built}
        for _ in range(rounds + 1):  # the first one warms up
            for name, each in built.items():
                begun = time.perf_counter()
                jax.block_until_ready(each(*arrays))
                seconds[name].append(time.perf_counter() - begun)
        for name, each in built.items():
            ratio = np.array(seconds[name][1:]) / seconds["three bare products"][1:]
            low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
            row = {
                "shape": f"{tokens} x {features} x {vocab}",
                "what": name,
                "ratio": middle,
                "ratio_q1": low,
                "ratio_q3": high,
            }
            memory = each.memory_analysis().temp_size_in_bytes / 2**20
            rows.append(row | {"milliseconds": 1e3 * np.median(seconds[name][1:]), "temporary_mb": memory})
        print(pd.DataFrame(rows[-len(built) :]).round(3).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def main(losses: tuple[str, ...] = ("nll", "brier", "hinge"), rounds: int = 7, quick: bool = False) -> None:
    """See the top of the file."""
    folder = new_folder("bench", "runs/bench_linear_loss")
    write_frame(folder, "heads", run(losses, SHAPES[:1] if quick else SHAPES, rounds))
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
