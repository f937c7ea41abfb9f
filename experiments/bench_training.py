"""What does training save when the loss goes through linear_loss, and not through a batch's logits?

One block of steps of an MLP on the text that comes with Python, as tokens of a BPE trained on it. Both heads run in turn:
ratio to the naive head in the same round, median and quartiles, and what XLA says of temporary memory.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from bench_peers import spread

from xentlab import resolve
from xentlab.program import program
from xentlab.recipe import Recipe
from xentlab.runs import new_folder, record, write_frame, write_record
from xentlab.sources import Source, Text

HEADS = ("naive", "linear_loss")


def run(losses, source: Source, model: str = "mlp", batch: int = 32, rounds: int = 7, steps: int = 5) -> pd.DataFrame:
    """A row a loss and head: milliseconds a step, ratio to the naive head (median, quartiles), temporary MB, training loss."""
    rows = []
    for name in losses:
        built, states, seconds, ended = {}, {}, {}, {}
        for head in HEADS:
            recipe = Recipe(steps * (rounds + 1), batch, blocks=rounds + 1, validation_tokens=32, head=head)
            parts = program(resolve(name), source, model, recipe)
            rates = jnp.asarray([1e-3], jnp.float32)
            states[head] = parts.begin(rates, jnp.asarray([0], jnp.uint32))
            built[head], seconds[head] = parts.compiled(1)[0], []
        for start, places in parts.draws([0]):  # the first one warms up
            for head in HEADS:
                begun = time.perf_counter()
                states[head], loss = jax.block_until_ready(built[head](rates, states[head], start, places))
                seconds[head].append((time.perf_counter() - begun) / steps)
                ended[head] = float(loss[0])
        for head in HEADS:
            ratio = np.array(seconds[head][1:]) / seconds["naive"][1:]
            row = {"loss": name, "vocab": source.vocab, "tokens": batch * Recipe().window, "head": head}
            row |= spread("ratio", ratio) | {"milliseconds": 1e3 * np.median(seconds[head][1:])}
            memory = built[head].memory_analysis().temp_size_in_bytes / 1e6
            rows.append(row | {"temporary_mb": memory, "train_loss": ended[head]})
    return pd.DataFrame(rows)


def main(
    losses: tuple[str, ...] = ("nll", "brier", "entmax15"), vocab: int = 4096, model: str = "mlp", rounds: int = 7
) -> None:
    """See the top of the file."""
    begun, source = time.perf_counter(), Text(tokenizer="bpe", bpe_vocab=vocab)
    frame = run(losses, source, model, rounds=rounds)
    print(frame.round(3).to_string(index=False))
    folder = new_folder("bench-training")
    write_frame(folder, "training", frame)
    arguments = {"losses": losses, "vocab": vocab, "model": model, "rounds": rounds}
    write_record(folder, record(arguments, [source.describe()], time.perf_counter() - begun))
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
