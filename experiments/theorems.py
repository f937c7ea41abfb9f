"""Does the audit find what is proved of losses that it does not know?

Losses of the literature that are not in the catalogue, and a property of each that its paper has, some of two classes or in
another unit of the logits. The audit sees the functions alone. Calibrated: the likeliest class leads at every minimiser.
"""

import pathlib

import jax
import jax.numpy as jnp
import pandas as pd
import tyro
from jax.nn import log_softmax, relu, sigmoid, softmax, softplus

from xentlab import LOSSES, at_target, audit
from xentlab.runs import new_folder, write_frame

nll, b, alpha, weights = LOSSES["nll"], 0.3, 3.0, jnp.array([1.0, 2.0, 3.0, 4.0])
hot = lambda z, y: jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
margins = lambda z, y: (2 * hot(z, y) - 1) * z  # of each class against the rest
total = lambda each: jnp.sum(each, axis=-1)
rivals = lambda each, y: total(each) - at_target(each, y)
p = lambda z, y: at_target(softmax(z), y)
LOSSES_OF_OTHERS = {
    "pairwise logistic": lambda z, y: rivals(softplus(z - at_target(z, y)[..., None]), y),
    "hinge of centred logits": lambda z, y: rivals(relu(1 + z - jnp.mean(z, axis=-1, keepdims=True)), y),
    "one-vs-rest hinge": lambda z, y: total(relu(1 - margins(z, y))),
    "one-vs-rest exponential": lambda z, y: total(jnp.exp(-margins(z, y))),
    "one-vs-rest Savage": lambda z, y: total(sigmoid(-margins(z, y)) ** 2),
    "ranked probability": lambda z, y: total(jnp.cumsum(softmax(z) - hot(z, y), axis=-1) ** 2),
    "density power": lambda z, y: total(softmax(z) ** (1 + b)) - (1 + 1 / b) * p(z, y) ** b + 1 / b,
    "pseudospherical": lambda z, y: 1 - p(z, y) ** 2 / total(softmax(z) ** 3) ** (2 / 3),
    "alpha-loss": lambda z, y: alpha / (alpha - 1) * (1 - p(z, y) ** (1 - 1 / alpha)),
    "normalised cross entropy": lambda z, y: nll(z, y) / -total(log_softmax(z)),
    "partially huberised": lambda z, y: jnp.where(p(z, y) > 0.1, nll(z, y), 1 + jnp.log(10.0) - 10 * p(z, y)),
    "class weights": lambda z, y: weights[y] * nll(z, y),
}
PROVED = {
    "pairwise logistic": ("Zhang 2004, JMLR", {"calibrated": True}),
    "hinge of centred logits": ("Lee, Lin & Wahba 2004, JASA", {"calibrated": True, "convex": True}),
    "one-vs-rest hinge": ("Zhang 2004, JMLR", {"calibrated": False, "convex": True}),
    "one-vs-rest exponential": ("Friedman et al. 2000, Ann. Stat.", {"proper_through": "sigmoid(2z)", "calibrated": True}),
    "one-vs-rest Savage": (
        "Masnadi-Shirazi & Vasconcelos 2008",
        {"proper_through": "sigmoid", "bounded": True, "convex": False},
    ),
    "ranked probability": ("Murphy 1969", {"strictly_proper": True, "permutation_equivariant": False}),
    "density power": ("Basu et al. 1998, Biometrika", {"strictly_proper": True, "bounded": True}),
    "pseudospherical": ("Good 1971", {"strictly_proper": True, "bounded": True}),
    "alpha-loss": ("Sypherd et al. 2022, arXiv:1906.02314", {"calibrated": True, "convex": False}),
    "normalised cross entropy": ("Ma et al. 2020, arXiv:2006.13554", {"bounded": True}),
    "partially huberised": ("Menon et al. 2020, ICLR", {"bounded": True, "lipschitz": True}),
    "class weights": ("Elkan 2001, IJCAI", {"strictly_proper": False, "calibrated": False}),
}


def run(losses=tuple(PROVED)) -> pd.DataFrame:
    """A row a loss and property: what is proved, what the audit found, by whom, and what the loss is a multiple of."""
    rows = []
    for name in losses:
        (source, proved), found = PROVED[name], audit(LOSSES_OF_OTHERS[name]).verdicts
        kin = (found["same_gradient_as"].value or {}).get("loss", "")
        rows += [(name, key, each, found[key].value, found[key].value == each, source, kin) for key, each in proved.items()]
    return pd.DataFrame(rows, columns=["loss", "property", "proved", "found", "agrees", "source", "multiple_of"])


def main(losses: tuple[str, ...] = tuple(PROVED), out: pathlib.Path = pathlib.Path("runs/theorems")) -> None:
    """See the top of the file."""
    write_frame(folder := new_folder("theorems", out), "theorems", frame := run(losses))
    found = f"Of {len(frame)} properties of {frame.loss.nunique()} losses the audit finds {frame.agrees.sum()}."
    print(frame.to_string(index=False), found, f"Wrote {folder}.", sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
