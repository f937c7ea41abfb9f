"""What is left of a loss's gradient when the logits are bfloat16, as the vocabulary grows?

Hidden states and weight in bfloat16, the gradient by the weight against the same in float32. Written plainly a loss computes in
its logits' type: one whose gradient is a small difference of large terms, Brier's for one, loses a digit more than nll. The
catalogue's compute in float32 inside; `linear_loss` keeps the logits themselves wide, and rounds the gradient alone.
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

VOCABS = (64, 1024, 16_384, 65_536)
at = lambda values, targets: jnp.take_along_axis(values, targets[..., None], axis=-1)[..., 0]
squares = lambda p: jnp.sum(p**2, axis=-1)
PLAIN = {  # each as its formula has it
    "nll": lambda z, y: -at(jax.nn.log_softmax(z), y),
    "focal": lambda z, y: -((1 - at(jax.nn.softmax(z), y)) ** 2) * at(jax.nn.log_softmax(z), y),
    "spherical": lambda z, y: 1 - at(jax.nn.softmax(z), y) / jnp.sqrt(squares(jax.nn.softmax(z))),
    "brier": lambda z, y: squares(jax.nn.softmax(z) - jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)),
}
HEADS = ("written plainly", "catalogue", "linear_loss")


def run(losses=tuple(PLAIN), vocabs=VOCABS, tokens: int = 64, features: int = 128) -> pd.DataFrame:
    """A row a loss, vocabulary and head: |gradient by the weight - the right one| / |the right one|, norms over all entries."""
    rows = []
    for vocab in vocabs:
        rng = np.random.default_rng(0)  # logits of variance 1, as a model's are that has learned little
        drawn = lambda *shape, rng=rng: jnp.asarray(rng.normal(size=shape) / features**0.25, jnp.bfloat16)
        hidden, weight = drawn(tokens, features), drawn(features, vocab)
        targets = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
        for name in losses:
            of = lambda loss, targets=targets: lambda h, w: jnp.mean(loss(h @ w, targets))
            head = functools.partial(linear_loss, targets=targets, loss=resolve(name))
            right = jax.jit(jax.grad(of(resolve(name)), 1))(*(each.astype(jnp.float32) for each in (hidden, weight)))
            for which, function in zip(HEADS, (of(PLAIN[name]), of(resolve(name)), head), strict=True):
                found = jax.jit(jax.grad(function, 1))(hidden, weight).astype(jnp.float32)
                error = float(jnp.linalg.norm(found - right) / jnp.linalg.norm(right))
                rows.append({"loss": name, "vocab": vocab, "head": which, "error": error})
    return pd.DataFrame(rows)


def told(frame: pd.DataFrame) -> str:
    """The errors at the largest vocabulary, in a sentence."""
    largest = frame[frame.vocab == frame.vocab.max()].pivot(index="loss", columns="head", values="error")
    plain = ", ".join(f"{name} {error:.2g}" for name, error in largest[HEADS[0]].sort_values().items())
    most = ", ".join(f"{head}'s by at most {largest[head].max():.1g} ({largest[head].idxmax()})" for head in HEADS[1:])
    return f"At V = {frame.vocab.max():,} a gradient written plainly is off by this much of its length: {plain}; the {most}."


def chart(frame: pd.DataFrame) -> alt.Chart:
    """Error by vocabulary, a line a loss, a panel a head; 1 is an error as long as the gradient."""
    lines = alt.Chart(frame[frame.error > 0]).mark_line(point=True)  # an error of 0 has no logarithm
    x = alt.X("vocab:Q", title="vocabulary").scale(type="log", base=2).axis(values=list(VOCABS))
    y = alt.Y("error:Q", title="error / gradient").scale(type="log").axis(format=".0e")
    lines = lines.encode(x, y, alt.Color("loss:N", title=None, sort=list(PLAIN)))
    return lines.properties(width=280, height=260).facet(alt.Column("head:N", title=None, sort=list(HEADS)))


def main(losses: tuple[str, ...] = tuple(PLAIN), out: pathlib.Path = pathlib.Path("runs/narrow_logits")) -> None:
    """See the top of the file."""
    write_frame(folder := new_folder("narrow_logits", out), "narrow_logits", frame := run(losses))
    write_png(chart(frame), folder / "narrow_logits.png", scale=2)
    table = frame.pivot_table("error", "loss", ["head", "vocab"], sort=False)
    print(table.to_string(float_format="%.1e"), told(frame), f"Wrote {folder}.", sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
