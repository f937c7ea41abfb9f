"""How many yes/no questions is a token worth: by entropy, by Huffman's whole questions, and in bytes that were written?

-log p in bits is a number of questions (claims 8 and 12). Whole questions give whole bits: Huffman's code for .1/.4/.5 takes
1.5 bits a token where the entropy is 1.36096 (claim 13); a range coder has no such step, and its file shows it.
"""

import heapq
import itertools

import altair as alt
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import information
from xentlab.charts import write_png
from xentlab.coding import decode, encode
from xentlab.runs import new_folder, write_frame


def huffman(law) -> list[int]:
    """The number of questions for each token in Huffman's code (1952): the two least likely are joined, again and again."""
    count = itertools.count()
    heap = [(p, next(count), {token: 0}) for token, p in enumerate(law)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (p, _, left), (q, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (p + q, next(count), {token: depth + 1 for token, depth in (left | right).items()}))
    return [heap[0][2][token] for token in range(len(law))]


def prices(probabilities=(1.0, 0.9, 0.1, 0.01)) -> pd.DataFrame:
    """-log p in nats and in bits."""
    nats = np.asarray(information.self_information(jnp.asarray(probabilities, jnp.float32)), np.float64)
    return pd.DataFrame({"p": probabilities, "nats": nats, "bits": nats / np.log(2)})


def written(law, tokens: int, seed: int) -> tuple[float, float]:
    """Bits a token in a file of a range coder, decoded back and compared; and the same draw's own -log2 p, a token."""
    drawn = np.random.default_rng(seed).choice(len(law), tokens, p=law).astype(np.int32)
    predict = lambda windows: np.broadcast_to(np.float32(law), (*windows.shape, len(law)))
    coded = encode(predict, drawn, len(law), window=512, lanes=32)
    if not np.array_equal(decode(predict, coded.file), drawn):
        raise AssertionError("the text did not come back")
    return coded.payload_bits / tokens, float(-np.log2(np.asarray(law)[drawn]).mean())


def run(law=(0.1, 0.4, 0.5), tokens: int = 100_000, seed: int = 0) -> pd.DataFrame:
    """Bits a token: entropy, Huffman's mean, the range coder's file, and what that file's own draw is worth."""
    entropy = float(information.entropy(jnp.asarray(law, jnp.float32))) / np.log(2)
    file, draw = written(law, tokens, seed)
    rows = {"entropy": entropy, "Huffman": float(np.dot(law, huffman(law))), "range coder": file, "its draw": draw}
    return pd.DataFrame({"code": rows.keys(), "bits_per_token": rows.values()})


if __name__ == "__main__":
    write_frame(folder := new_folder("questions", "runs/questions"), "prices", prices(tuple(np.linspace(0.01, 1, 100))))
    write_frame(folder, "codes", found := run())
    curve = pd.read_csv(folder / "prices.csv").melt("p", var_name="unit", value_name="price")
    chart = alt.Chart(curve, title="What a token at p costs").mark_line(strokeWidth=2.5).encode(x="p", y="price", color="unit")
    write_png(chart.properties(width=520, height=300), folder / "prices.png")
    print(prices().to_string(index=False), found.to_string(index=False), f"Wrote {folder}.", sep="\n")
