"""The head in the form that other chips get: run on a CPU, on a mesh in test_linear_mesh.py, and lowered for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_heads import CASES, NLL, VOCAB, batch, close, every_naive_head, every_plan, heads, naive, weighted_batch

from xentlab import LOSSES
from xentlab.linear import explain_plan, linear_loss
from xentlab.linear import logits as logits_module
from xentlab.linear import plan as plan_module
from xentlab.linear.form import stream_of

TRAINS = True  # as in test_linear.py


@pytest.mark.parametrize(("backend", "plan", "held"), [("gpu", "stream", 0), ("gpu", "tokens", 10**9), ("tpu", "tokens", 0)])
def test_the_form_for_other_chips_is_right_too(backend, plan, held, monkeypatch):
    """Comparisons where a CPU scatters, all rows at once: run here, with a last tile that overlaps.

    held: bytes of gradients by logits that wait for one product; of none the chunks go one by one, and the last one overlaps.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(plan_module, "CHIP", dataclasses.replace(plan_module.CHIP, held_bytes=held))
    monkeypatch.setattr(logits_module, "MANY", 0)  # as of a large head
    names = ("nll", "brier", "hinge", "squared_hinge", "confidence_penalty", "squentropy", "entmax15")
    planned = [(loss, plan if plan == "tokens" or stream_of(loss) else "auto") for loss in map(LOSSES.get, names)]
    (arrays, targets), run = weighted_batch(), heads(planned)
    close(run(arrays, targets), [every_naive_head()[CASES.index(loss)] for loss, _ in planned])
    assert np.isnan([value for value, _ in run(arrays, targets.at[5].set(VOCAB))]).all()


@pytest.mark.parametrize("name", ["nll", "entmax15"])  # by its stream form, and by rows
def test_the_bias_gradient_is_summed_before_it_is_rounded(name, monkeypatch):
    """Of a large vocabulary a gradient by the logits is below what float16 has; its sum over tokens is not."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    hidden, weight, targets = batch(512, 4, 16_384, scale=0.02, dtype=np.float16)
    wide, bias = [hidden.astype(jnp.float32), weight.astype(jnp.float32)], jnp.zeros(16_384, jnp.float32)
    head = lambda bias: linear_loss(hidden, weight, targets, loss=LOSSES[name], bias=bias, plan="tokens", tiles=(200, 5000))
    plain = lambda bias: naive(LOSSES[name], targets, *wide, bias)
    close(jax.jit(jax.grad(head))(bias), np.asarray(jax.jit(jax.grad(plain))(bias)), 1e-4)


@every_plan
def test_lowers_for_other_chips(loss, plan, monkeypatch):
    """Every loss by every plan, in the form that it has there, for both; not run there."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    head = lambda h, w, y: linear_loss(h, w, y, loss=loss, plan=plan, tiles=(8, 128))
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((40, 16), jnp.bfloat16), ((16, 300), jnp.bfloat16), ((40,), jnp.int32))]
    exported = jax.export.export(jax.jit(jax.value_and_grad(head, (0, 1))), platforms=["cuda", "tpu"])(*shapes)
    assert exported.platforms == ("cuda", "tpu")


def test_on_a_chip_auto_takes_what_the_device_has_room_for(monkeypatch):
    class Chip:
        def __init__(self, size):
            self.size = size

        def memory_stats(self):
            return self.size and {"bytes_limit": self.size}

    shape = (8192, 2304, 256_000)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for size, taken in ((100e9, "tokens"), (20e9, "stream"), (None, "stream")):
        monkeypatch.setattr(jax, "local_devices", lambda size=size: [Chip(size and int(size))])
        assert explain_plan(*shape, NLL, jnp.bfloat16).name == taken
        assert explain_plan(*shape, LOSSES["entmax15"], jnp.bfloat16).name == "tokens"
    monkeypatch.setattr(jax, "local_devices", lambda: [Chip(int(100e9))])
    large = explain_plan(*shape, NLL, jnp.bfloat16)
    assert large.tiles == (1024, 256_000)
    assert "under 1/16 of the memory" in large.why
    assert explain_plan(*shape, NLL, jnp.bfloat16, per_token=True).name == "stream"  # four products either way
    assert explain_plan(*shape, NLL, jnp.bfloat16, "stream").tiles == (8192, 2560)  # divides the vocabulary
    assert explain_plan(64, 8, 300, NLL).tiles == (64, 300)
