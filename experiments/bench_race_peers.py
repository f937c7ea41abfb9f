"""Do those who train a grid of runs by hand learn what xentlab's runs learn?

The grids of `bench_race.py` and its peers: a Python loop of jitted steps, torch eager, torch in as many processes as threads.
They get xentlab's first parameters and windows ready-made. Here each run's loss in each of the first steps is compared.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from bench_peers import REMEDIES, THREADS, on_two_cores

from xentlab import LOSSES, LabError
from xentlab.program import Program, program, windows
from xentlab.recipe import Recipe
from xentlab.sources import MarkovSource
from xentlab.training import train

NLL, VOCAB, CONTEXT, HEADS = LOSSES["nll"], 64, 8, 4
LOOP, TORCH, TORCHES = "Python loop of jitted steps", "torch eager", "torch eager, two processes"
CHECKED, TOLERANCE = 12, 1e-4  # steps, and of a loss: sums in another order, and what Adam makes of them
SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads
NO_TORCH = "" if importlib.util.find_spec("torch") else f"torch is not installed: {REMEDIES['torch']}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is trained: a model, a recipe, rates by seeds; products: a step's, (rows, in, out) or (how many, rows, in, out)."""

    name: str
    model: str
    recipe: Recipe
    products: tuple[tuple[int, ...], ...]
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    seeds: int = 8

    @property
    def pairs(self) -> tuple[jax.Array, jax.Array]:
        """The rate and the seed of each run, [R] each, in the order of `train`."""
        rates, seeds = zip(*itertools.product(self.rates, range(self.seeds)), strict=True)
        return jnp.asarray(rates, jnp.float32), jnp.asarray(seeds, jnp.uint32)

    def shorter(self, steps: int, blocks: int, **more: Any) -> "Grid":
        """The same with fewer steps; more: other fields of the recipe."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, steps=steps, blocks=blocks, **more))

    def program(self) -> Program:
        """xentlab's, that compiles at its first call."""
        return program(NLL, source(), self.model, self.recipe)

    def trained(self, compiled: Program | None = None) -> np.ndarray:
        """By xentlab: mean losses [R, blocks]."""
        return train(NLL, source(), self.model, self.rates, range(self.seeds), self.recipe, compiled=compiled).train_loss


RECIPE = Recipe(steps=500, batch=8, window=8, optimizer="adam", schedule="constant", blocks=2, validation_tokens=512)
MLP = Grid("mlp", "mlp", RECIPE, ((64, 256, 128), (64, 128, 64), (64, 64, VOCAB)))
LAYER = ((1024, 64, 192), (64, 64, 16, 64), (64, 64, 64, 16), (1024, 64, 64), (1024, 64, 256), (1024, 256, 64))
TRANSFORMER = Grid(
    "transformer",
    f"transformer(layers=2, features=64, heads={HEADS})",
    dataclasses.replace(RECIPE, steps=50, batch=16, window=64, validation_tokens=1024),
    (*LAYER, *LAYER, (1024, 64, VOCAB)),
    rates=(1e-3, 3e-3),
    seeds=4,
)


@functools.cache
def source() -> MarkovSource:
    """The text of all grids."""
    return MarkovSource(vocab=VOCAB)


@dataclasses.dataclass(frozen=True)
class Work:
    """A grid's runs as anyone could take them over: first parameters by name, rates, windows [R, steps, B, T + 1]."""

    model: str
    starts: list[dict[str, np.ndarray]]
    rates: np.ndarray
    batches: np.ndarray
    held_out: np.ndarray
    steps_a_block: int

    def part(self, runs: slice) -> "Work":
        """Some of the runs."""
        return dataclasses.replace(self, starts=self.starts[runs], rates=self.rates[runs], batches=self.batches[runs])

    def measured_after(self, step: int) -> bool:
        """Whether a block ends with this step, the first being 1."""
        return step % self.steps_a_block == 0 or step == self.batches.shape[1]


def work_of(grid: Grid, compiled: Program) -> Work:
    """What `train` begins with and draws, drawn here."""
    recipe, stream = grid.recipe, source().split("train")
    rates, seeds = grid.pairs
    arrays, *_ = compiled.begin(rates, seeds)
    first = np.concatenate([places for _, places in compiled.draws(seeds.tolist())], axis=1)[:, : recipe.steps]
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    starts = [{name: leaf[run] for name, leaf in named.items()} for run in range(len(rates))]
    batches = stream[first[..., None] + np.arange(recipe.window + 1)]
    held_out = windows(source().split("validation"), recipe.window, recipe.validation_tokens)
    return Work(grid.model, starts, np.asarray(rates), batches, held_out, recipe.steps_a_block)


def mlp_by_hand(arrays: Any, tokens: jax.Array) -> jax.Array:
    """Logits [B, T, V] of the package's MLP as one writes it, with one product over the whole context."""
    padded = jnp.pad(tokens, ((0, 0), (CONTEXT - 1, 0)), constant_values=VOCAB)
    places = np.arange(tokens.shape[1])[:, None] + np.arange(CONTEXT - 1, -1, -1)  # the last token first
    embedded = arrays.embedding.at[padded[:, places]].get(mode="fill", fill_value=0)
    mixed = embedded.reshape(*tokens.shape, -1) @ arrays.mixing.reshape(-1, len(arrays.bias))
    return jax.nn.gelu(mixed + jnp.broadcast_to(arrays.bias, mixed.shape)) @ arrays.projection @ arrays.weight


def python_loop(grid: Grid, compiled: Program, work: Work) -> Callable[[], np.ndarray]:
    """A jitted step, called run by run and step by step: losses [R, steps]."""

    def logits(arrays, tokens):
        made = eqx.combine(arrays, compiled.rest)
        return mlp_by_hand(made, tokens) if grid.model == "mlp" else made.hidden(tokens) @ made.weight

    @jax.jit
    def value(arrays, batch):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(arrays, batch[:, :-1]), batch[:, 1:]))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(arrays, moments, rate, batch):
        loss, gradient = jax.value_and_grad(value)(arrays, batch)
        updates, moments = optax.adam(rate).update(gradient, moments, arrays)
        return optax.apply_updates(arrays, updates), moments, loss

    def call():
        every, moments_of_every, *_ = compiled.begin(*grid.pairs)
        losses = []
        for run, (rate, batches) in enumerate(zip(work.rates, work.batches, strict=True)):
            arrays, moments = jax.tree.map(lambda leaf, run=run: leaf[run], (every, moments_of_every))
            for index, batch in enumerate(batches, 1):
                arrays, moments, loss = step(arrays, moments, rate, batch)
                losses.append(loss)
                if work.measured_after(index):
                    float(value(arrays, work.held_out))
        return np.array(jax.device_get(losses)).reshape(work.batches.shape[:2])

    return call


def torch_mlp(of: dict[str, Any], contexts: Any) -> Any:
    """Logits [N, V] after contexts [N, 8], the last token first; before a window there is a token V, whose row is zero."""
    from torch.nn import functional

    embedded = functional.embedding(contexts, of["embedding"], padding_idx=VOCAB).flatten(1)
    inner = functional.linear(embedded, of["mixing"].flatten(0, 1).T, of["bias"])
    return functional.gelu(inner, approximate="tanh") @ of["projection"] @ of["weight"]


def torch_transformer(of: dict[str, Any], tokens: Any) -> Any:
    """Logits [N, V] after every token of windows [B, T]."""
    import torch
    from torch.nn import functional

    features = of["embedding"].shape[1]
    size, norm = features // HEADS, lambda x: functional.rms_norm(x, (features,), eps=1e-6)
    angle = torch.arange(tokens.shape[1])[:, None] * 10_000.0 ** (-torch.arange(size // 2) / (size // 2))
    cos, sin = angle.cos(), angle.sin()

    def rotary(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    x = functional.embedding(tokens, of["embedding"])
    for layer in range(sum(name.endswith(".qkv") for name in of)):
        qkv, out, up, down = (of[f"blocks.{layer}.{name}"] for name in ("qkv", "out", "up", "down"))
        q, k, v = (norm(x) @ qkv.flatten(1)).unflatten(-1, (3, HEADS, size)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
        x = x + seen.transpose(1, 2).flatten(2) @ out.flatten(0, 1)
        x = x + functional.gelu(norm(x) @ up, approximate="tanh") @ down
    return (norm(x) @ of["weight"]).flatten(0, 1)


def torch_runs(work: Work, threads: int) -> np.ndarray:
    """The runs one after another, eager, in this process: losses [R, steps]."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(threads)
    logits, losses = torch_mlp if work.model == "mlp" else torch_transformer, []
    held_out, right = (each[0] for each in _read_and_target(work.model, work.held_out[None]))
    for start, rate, batches in zip(work.starts, work.rates, work.batches, strict=True):
        rows = ((0, int(work.model == "mlp")), (0, 0))  # the zero row
        start = start | {"embedding": np.pad(start["embedding"], rows)}
        of = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in start.items()}
        optimizer = torch.optim.Adam(of.values(), lr=float(rate), fused=True)  # the fastest of its three forms
        for index, (read, targets) in enumerate(zip(*_read_and_target(work.model, batches), strict=True), 1):
            optimizer.zero_grad()
            loss = cross_entropy(logits(of, read), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if work.measured_after(index):
                with torch.no_grad():
                    cross_entropy(logits(of, held_out), right).item()
    return torch.stack(losses).reshape(work.batches.shape[:2]).numpy()


def _read_and_target(model: str, batches: np.ndarray) -> tuple[Any, Any]:
    """What a model reads of each batch, and its targets [N]."""
    import torch

    tokens, targets = batches[..., :-1], batches[..., 1:]
    if model == "mlp":
        padded = np.pad(tokens, ((0, 0), (0, 0), (CONTEXT - 1, 0)), constant_values=VOCAB)
        contexts = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT, axis=-1)[..., ::-1]
        tokens = contexts.reshape(len(batches), -1, CONTEXT)
    return tuple(torch.from_numpy(each.astype(np.int64)) for each in (tokens, targets.reshape(len(targets), -1)))


@contextlib.contextmanager
def torch_workers() -> Iterator[list[concurrent.futures.Executor]]:
    """A process for each thread, started; none without torch."""
    with contextlib.ExitStack() as stack:
        pool = lambda: concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN)
        yield [] if NO_TORCH else [stack.enter_context(pool()) for _ in range(THREADS)]


def peers(grid: Grid, compiled: Program, workers: list[concurrent.futures.Executor]) -> dict[str, Callable[[], np.ndarray]]:
    """Those who train it by hand, each a call that gives losses [R, steps]; torch in those processes."""
    work = work_of(grid, compiled)
    cuts = np.linspace(0, len(work.rates), len(workers) + 1).astype(int)
    parts = [work.part(slice(*cut)) for cut in itertools.pairwise(cuts)]

    def side_by_side():
        running = [worker.submit(torch_runs, part, 1) for worker, part in zip(workers, parts, strict=True)]
        return np.concatenate([each.result() for each in running])

    found = {LOOP: python_loop(grid, compiled, work)}
    if workers:
        found |= {TORCHES: side_by_side, TORCH: lambda: workers[0].submit(torch_runs, work, THREADS).result()}
    return found


def check(grid: Grid, workers: list[concurrent.futures.Executor]) -> dict[str, float]:
    """By how much of a loss each peer is off at the most in the first steps. Raises `LabError` if that is too much."""
    short = grid.shorter(CHECKED, CHECKED, validation_tokens=256)  # of which nothing is compared
    compiled = short.program()
    expected, off = short.trained(compiled), {}
    for name, call in peers(short, compiled, workers).items():
        off[name] = float(np.max(np.abs(call() / expected - 1)))
        if not off[name] <= TOLERANCE:
            raise LabError(f"{name} trains another {grid.name}: a loss is off by {off[name]:.1e}; {TOLERANCE} is allowed.")
    return off


def run(grids=(MLP, TRANSFORMER)) -> pd.DataFrame:
    """A row a grid and peer: how far it is off. Raises `LabError` if that is too far."""
    with torch_workers() as workers:
        rows = [(grid.name, *each) for grid in grids for each in check(grid, workers).items()]
    return pd.DataFrame(rows, columns=["grid", "what", "off"])


def main() -> None:
    """See the top of the file."""
    on_two_cores()
    print(run().to_string(index=False), NO_TORCH, sep="\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
