"""What is left of a loss's gradient when the logits are bfloat16, as the vocabulary grows?

Hidden states and weight in bfloat16, the gradient by the weight against the same in float32. The naive head rounds its logits
to bfloat16, and the loss computes in it; `linear_loss` keeps them wide, and rounds the gradient alone. A loss whose gradient is
a small difference of large terms, Brier's for one, keeps none of it in the naive head; nll keeps two digits.
"""

import functools
import pathlib

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from xentlab import linear_loss, resolve
from xentlab.charts import write_png
from xentlab.runs import new_folder, write_frame

LOSS_NAMES = ("nll", "focal", "hinge", "generalized_cross_entropy", "spherical", "brier", "entmax15")
VOCABS = (64, 1024, 16_384, 65_536)


def run(losses=LOSS_NAMES, vocabs=VOCABS, tokens: int = 64, features: int = 128) -> pd.DataFrame:
    """A row a loss, vocabulary and head: |gradient by the weight - the right one| / |the right one|, norms over all entries."""
    rows = []
    for vocab in vocabs:
        rng = np.random.default_rng(0)  # logits of variance 1, as a model's are that has learned little
        drawn = lambda *shape, rng=rng: jnp.asarray(rng.normal(size=shape) / features**0.25, jnp.bfloat16)
        hidden, weight = drawn(tokens, features), drawn(features, vocab)
        targets = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
        for name in losses:
            loss = resolve(name)
            naive = lambda h, w, loss=loss, targets=targets: jnp.mean(loss(h @ w, targets))
            heads = {"naive": naive, "linear_loss": functools.partial(linear_loss, targets=targets, loss=loss)}
            right = jax.jit(jax.grad(naive, 1))(*(each.astype(jnp.float32) for each in (hidden, weight)))
            for head, function in heads.items():
                found = jax.jit(jax.grad(function, 1))(hidden, weight).astype(jnp.float32)
                error = float(jnp.linalg.norm(found - right) / jnp.linalg.norm(right))
                rows.append({"loss": name, "vocab": vocab, "head": head, "error": error})
    return pd.DataFrame(rows)


def told(frame: pd.DataFrame) -> str:
    """The errors at the largest vocabulary, in a sentence."""
    largest = frame[frame.vocab == frame.vocab.max()].pivot(index="loss", columns="head", values="error")
    naive, head = ", ".join(f"{name} {error:.2g}" for name, error in largest.naive.sort_values().items()), largest.linear_loss
    said = f"At V = {frame.vocab.max():,} the naive head's gradient is off by this much of its length: {naive}."
    return f"{said} linear_loss's by {head.min():.1g} ({head.idxmin()}) to {head.max():.1g} ({head.idxmax()})."


def chart(frame: pd.DataFrame) -> alt.Chart:
    """Error by vocabulary, a line a loss, a panel a head; 1 is an error as long as the gradient."""
    scales = {"x": {"type": "log", "base": 2}, "y": {"type": "log", "domain": [1e-4, 1e3], "clamp": True}}
    lines = alt.Chart(frame[frame.error > 0]).mark_line(point=True)  # an error of 0 has no logarithm
    lines = lines.encode(
        alt.X("vocab:Q", title="vocabulary", scale=scales["x"]).axis(values=list(VOCABS)),
        alt.Y("error:Q", title="error / gradient", scale=scales["y"]).axis(format=".0e"),
        alt.Color("loss:N", title=None, sort=list(LOSS_NAMES)),
    )
    return lines.properties(width=280, height=260).facet(alt.Column("head:N", title=None, sort=["naive", "linear_loss"]))


def main(losses: tuple[str, ...] = LOSS_NAMES, out: pathlib.Path = pathlib.Path("runs/narrow_logits")) -> None:
    """See the top of the file."""
    write_frame(folder := new_folder("narrow_logits", out), "narrow_logits", frame := run(losses))
    write_png(chart(frame), folder / "narrow_logits.png", scale=2)
    print(
        frame.pivot_table("error", "loss", ["head", "vocab"], sort=False).to_string(float_format="%.1e"), told(frame), sep="\n"
    )
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
