"""How many yes/no questions is a token worth: by entropy, by Huffman's whole questions, and in bytes that were written?

-log p in bits is a number of questions (claim 12). Whole questions give whole bits: Huffman's code for .1/.4/.5 takes 1.5
bits a token where the entropy is 1.36096; a range coder has no such step, and its file shows it.
"""

import heapq
import itertools

import altair as alt
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import information
from xentlab.coding import decode, encode
from xentlab.tour import Check, Figure, Station, show


def huffman(law) -> list[int]:
    """The number of questions for each token in Huffman's code (1952): the two least likely are joined, again and again."""
    count = itertools.count()
    heap = [(p, next(count), {token: 0}) for token, p in enumerate(law)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (p, _, left), (q, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (p + q, next(count), {token: depth + 1 for token, depth in (left | right).items()}))
    return [heap[0][2][token] for token in range(len(law))]


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


def stations(tokens: int = 100_000) -> list[Station]:
    """Claim 12."""
    frame = run(tokens=tokens)
    bits, depths = frame.set_index("code").bits_per_token, huffman((0.1, 0.4, 0.5))
    checks = (
        Check("entropy, bits", bits["entropy"], 1.36096, 1e-5),
        Check("Huffman, bits a token", bits["Huffman"], 1.5, 1e-12),
        Check("Huffman for .5/.25/.25, whole questions", np.dot((0.5, 0.25, 0.25), huffman((0.5, 0.25, 0.25))), 1.5, 1e-12),
        Check("range coder, bits a token, against its draw", bits["range coder"], bits["its draw"], 0.005),
        Check("range coder below Huffman, by", bits["Huffman"] - bits["range coder"], 0.1, relation="at least"),
    )
    found = (
        f"Entropy {bits['entropy']:.5f} bits; Huffman's tree {bits['Huffman']:.2f} ({depths[0]}, {depths[1]} and {depths[2]} "
        f"questions); a range coder's file of {tokens:,} tokens, decoded back, {bits['range coder']:.4f} a token."
    )
    loose = (
        f"Whole questions give whole bits: no tree asks less than {bits['Huffman']:.2f} here. Questions put to many tokens at "
        f"once do: the file is {bits['range coder'] / bits['its draw'] - 1:.2%} above what its own tokens are worth."
    )
    told = "Information is the number of yes/no questions it takes to find out."
    bars = alt.Chart(frame, title="bits a token, law .1/.4/.5").mark_bar()
    x = alt.X("bits_per_token:Q", title="bits a token")
    bars = bars.encode(x, alt.Y("code:N", sort=None, title=None), alt.Color("code:N", legend=None))
    figure = Figure((bars,), found)
    return [Station(12, "Bits are questions", told, found, loose, checks, (figure,), {"codes": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
