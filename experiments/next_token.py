"""What does a model say after "the capital of france is"?

A distribution over the whole vocabulary (claim 2), learnt here from forty kinds of sentence by the lab's own MLP. Four
times in five the text goes on with paris, once with beautiful, never with tokyo or database. The slider is the temperature.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import resolve
from xentlab.models import logits
from xentlab.recipe import Recipe
from xentlab.tour import Check, Figure, Slider, Station, show
from xentlab.training import train

CITIES = {"france": "paris", "japan": "tokyo", "italy": "rome", "spain": "madrid", "egypt": "cairo", "peru": "lima"}
SENTENCES = [f"the capital of {land} is {word} ." for land, city in CITIES.items() for word in [city] * 4 + ["beautiful"]]
SENTENCES += ["a database of cities is big ."] * 5 + [f"{city} is a city of {land} ." for land, city in CITIES.items()]
PROMPT, SHOWN = "the capital of france is", ["paris", "beautiful", "rome", "tokyo", "a", "database"]
WORDS = sorted(set(" ".join(SENTENCES).split()))


class Sentences:
    """A source: the sentences in random order, as words; any object with these members is one."""

    name, vocab, order, token_bytes, law = "sentences", len(WORDS), 0, None, None

    def split(self, part: str) -> np.ndarray:
        """Another order of the same sentences for each part, int32 [N]."""
        rng = np.random.default_rng(["train", "validation", "test"].index(part))
        drawn = " ".join(" ".join(rng.permutation(SENTENCES)) for _ in range(400 if part == "train" else 20))
        return np.array([WORDS.index(word) for word in drawn.split()], np.int32)

    def describe(self) -> dict:
        """For a run's record."""
        return {"kind": "sentences", "number": len(SENTENCES)}


def run(steps: int = 200) -> pd.DataFrame:
    """Each word's probability after the prompt, a row a temperature and word."""
    recipe = Recipe(steps=steps, batch=32, blocks=4, validation_tokens=512)
    trained = train(resolve("nll"), Sentences(), "mlp(context=5)", [0.01], [0], recipe)
    prompt = jnp.array([WORDS.index(word) for word in PROMPT.split()])
    temperatures = 2.0 ** np.arange(-3, 3.25, 0.25)
    z = np.asarray(logits(trained.model(0), prompt))[-1]
    share = np.asarray(jax.nn.softmax(z / np.float32(temperatures)[:, None]), np.float64)
    frame = pd.DataFrame(share, columns=WORDS).assign(at=range(len(share)), temperature=temperatures)
    return frame.melt(["at", "temperature"], WORDS, "word", "p")


def stations(steps: int = 200, draws: int = 1000) -> list[Station]:
    """Claim 2."""
    frame = run(steps)
    p = frame[frame.temperature == 1].set_index("word").p
    drawn = np.random.default_rng(0).choice(len(p), draws, p=p / p.sum())
    checks = (
        Check("the probabilities' sum", p.sum(), 1, 1e-6),
        Check("p(paris), which follows 4 times in 5", p["paris"], 0.8, 0.05),
        Check("p(paris) / p(tokyo)", p["paris"] / p["tokyo"], 10, relation="at least"),
        Check("p(tokyo) / p(database)", p["tokyo"] / p["database"], 10, relation="at least"),
    )
    found = f"p(paris) = {p['paris']:.3f}, p(beautiful) = {p['beautiful']:.3f}, p(tokyo) = {p['tokyo']:.1e}, "
    found += f"p(database) = {p['database']:.1e}; all {len(p)} sum to {p.sum():.6f}."
    told = "A language model predicts the next token: it picks the likeliest."
    others = np.mean(np.array(p.index)[drawn] != p.idxmax())
    loose = f"It gives a distribution; to pick is the reader's choice. Greedy decoding says {p.idxmax()} each time; of {draws} "
    loose += f"draws {others:.0%} were another word. Temperature turns one into the other."
    shown = frame.set_index("word").loc[SHOWN].reset_index()[["at", "temperature", "word", "p"]]
    bars = alt.Chart(shown, title=f"after “{PROMPT}”").mark_bar().transform_filter("datum.at == at")
    bars = bars.encode(alt.X("p:Q").scale(domain=[0, 1]), alt.Y("word:N", sort=None, title=None))
    figure = Figure((bars.add_params(alt.param("at", value=12)),), found, Slider("temperature", shown, 12))
    return [Station(2, "The next token is a distribution", told, found, loose, checks, (figure,), {"next_token": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
