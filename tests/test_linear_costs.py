"""What XLA says of the compiled head: FLOPs, memory, what is written; nothing is run."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from naive_heads import both, cpus_alone
from scripts import in_process

from xentlab import LOSSES, at_target
from xentlab.linear import explain_plan, linear_loss
from xentlab.linear.costs import Cost, head_costs
from xentlab.products import moved_whole

FUSED_WELL = True


def compiled(function, *shapes):
    return jax.jit(function).lower(*[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]).compile()


BIG = (((512, 64), jnp.float32), ((64, 8192), jnp.float32), ((512,), jnp.int32))


@both
def test_the_loss_alone_does_not_pay_for_gradients(plan):
    """One product where value and gradient take three: XLA counts a loop's body once, and in one tile recomputes nothing."""
    tiles = (512, 8192)
    head = lambda h, w, y: linear_loss(h, w, y, plan=plan, tiles=tiles)
    alone = compiled(head, *BIG).cost_analysis()["flops"]
    whole = compiled(jax.value_and_grad(head, (0, 1)), *BIG).cost_analysis()["flops"]
    product = 2 * 512 * 64 * 8192
    assert product < alone < 1.6 * product
    assert whole > 3 * product


@pytest.mark.parametrize(("plan", "most"), [("tokens", 0.6), ("stream", 0.12)])
@pytest.mark.parametrize("name", ["nll", "brier", "focal"])
def test_memory_stays_far_below_the_naive_heads(plan, most, name):
    loss = LOSSES[name]
    memory = lambda f: compiled(jax.value_and_grad(f, (0, 1)), *BIG).memory_analysis().temp_size_in_bytes
    mine = memory(lambda h, w, y: linear_loss(h, w, y, loss=loss, plan=plan, tiles=(64, 256)))
    assert mine < most * memory(lambda h, w, y: jnp.mean(loss(h @ w, y)))


@cpus_alone
@pytest.mark.parametrize(
    ("names", "tokens", "features", "vocab", "most"),
    [
        (("hinge", "hinge_weston_watkins", "label_smoothing", "confidence_penalty", "squentropy"), 1024, 256, 32_768, 6e6),
        (("nll",), 2048, 512, 50_304, 16e6),
        (("nll",), 4096, 512, 128_256, 45e6),
    ],
)
def test_two_tiles_are_held_and_no_third(names, tokens, features, vocab, most):
    """By losses of several sums, whose terms would lie side by side, as by nll."""
    shapes = (((tokens, features), jnp.float32), ((features, vocab), jnp.float32), ((tokens,), jnp.int32))
    for name in names:
        head = compiled(jax.value_and_grad(functools.partial(linear_loss, loss=LOSSES[name], plan="stream"), (0, 1)), *shapes)
        assert head.memory_analysis().temp_size_in_bytes < most, name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_large_head_fits(dtype):
    """Compiled, not run: what XLA says of N = 8192, D = 2304, V = 256,000, where the naive head holds some 16,000 MB."""
    shapes = (((8192, 2304), dtype), ((2304, 256_000), dtype), ((8192,), jnp.int32))
    head = compiled(jax.value_and_grad(functools.partial(linear_loss, plan="stream"), (0, 1)), *shapes)
    most = 90e6 if dtype == jnp.float32 else 220e6
    if moved_whole(dtype):  # the gradient as bits
        most += 2 * 2304 * 256_000
    assert head.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "features", "vocab"), [(1024, 256, 32_768), (256, 256, 32_768), (8192, 2304, 256_000)])
@pytest.mark.parametrize(("plan", "name"), [("tokens", "nll"), ("stream", "nll"), ("tokens", "entmax15")])
def test_what_explain_plan_reckons_is_about_what_xla_holds(plan, name, tokens, features, vocab, dtype):
    loss = LOSSES[name]
    shapes = (((tokens, features), dtype), ((features, vocab), dtype), ((tokens,), jnp.int32))
    head = compiled(jax.value_and_grad(functools.partial(linear_loss, loss=loss, plan=plan), (0, 1)), *shapes)
    reckoned = explain_plan(tokens, features, vocab, loss, dtype, plan).temporary_bytes
    assert 0.7 < head.memory_analysis().temp_size_in_bytes / reckoned < 1.05


@cpus_alone
@pytest.mark.parametrize(
    ("plan", "name", "shape", "dtype"),
    [
        *(("tokens", "nll", shape, jnp.float32) for shape in ((600, 1024, 700), (600, 1024, 4096), (300, 2048, 1000))),
        *(("stream", "nll", shape, jnp.float16) for shape in ((5000, 16, 1000), (1000, 64, 5003), (20_000, 256, 700))),
        *(("tokens", "entmax15", shape, jnp.float32) for shape in ((20_000, 256, 700), (5000, 16, 1000))),
        ("tokens", "entmax15", (127, 512, 50_257), jnp.float16),
    ],
)
def test_few_classes_wide_states_and_narrow_types_are_reckoned(plan, name, shape, dtype):
    tokens, features, vocab = shape
    shapes = (((tokens, features), dtype), ((features, vocab), dtype), ((tokens,), jnp.int32))
    head = compiled(jax.value_and_grad(functools.partial(linear_loss, loss=LOSSES[name], plan=plan), (0, 1)), *shapes)
    reckoned = explain_plan(*shape, LOSSES[name], dtype, plan).temporary_bytes
    assert 1 / 1.35 < head.memory_analysis().temp_size_in_bytes / reckoned < 1.3


def test_auto_takes_tokens_where_that_is_the_smaller(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "holds no more than that" in explain_plan(600, 1024, 700).why


def test_the_sum_of_the_devices_gradients_is_reckoned():
    plan = explain_plan(64, 256, 65_536, LOSSES["nll"], plan="tokens", layout=(8, 1))
    assert plan.temporary_bytes >= 256 * 65_536 * 4


def test_one_head_is_the_one_that_is_taken():
    taken = [cost.head for cost in head_costs(64, 8, 512) if cost.taken_by_auto]
    assert taken == [explain_plan(64, 8, 512, LOSSES["nll"]).name]


def test_large_heads_are_told_in_megabytes_too(monkeypatch, capsys):
    costs = [Cost(head, False, 2 * 10**9, 10**6, 3, 5 * 10**9, {}) for head in ("stream", "tokens", "naive")]
    monkeypatch.setattr("xentlab.linear.costs.head_costs", lambda *_: costs)
    _, out, _ = in_process(capsys, "plan", "--tokens", 64, "--features", 8, "--vocab", 64)
    assert re.search(r"^naive +2,000 +1 +3 +5 *$", out, re.MULTILINE)


def test_an_estimate_that_the_compiler_contradicts_is_told(monkeypatch, capsys):
    alike = lambda *shape, real=explain_plan, **rest: dataclasses.replace(real(*shape, **rest), temporary_bytes=10**9)
    monkeypatch.setattr("xentlab.linear.explain_plan", alike)
    for stream, tokens in ((2, 1), (1, 2)):
        held = {"stream": stream * 10**9, "tokens": tokens * 10**9, "naive": 3 * 10**9}
        costs = [Cost(head, False, each, 10**6, 3, 10**9, {}) for head, each in held.items()]
        monkeypatch.setattr("xentlab.linear.costs.head_costs", lambda *_, costs=costs: costs)
        _, out, _ = in_process(capsys, "plan", "--tokens", 8192, "--features", 8, "--vocab", 65_536)
        assert "auto takes tokens" in out
        assert ("MB for tokens; as compiled, above, stream holds less" in out) == (stream < tokens)


@pytest.mark.parametrize("plan", ["tokens", "stream"])
def test_a_bfloat16_weight_of_which_classes_are_read_is_not_widened(plan):
    """By a loss whose margins want each target's logit ahead."""
    shapes = (((64, 128), jnp.bfloat16), ((128, 8192), jnp.bfloat16), ((64,), jnp.int32))
    head = lambda name: jax.value_and_grad(
        functools.partial(linear_loss, loss=LOSSES[name], plan=plan, tiles=(32, 512)), (0, 1)
    )
    nll, ahead = (compiled(head(name), *shapes).memory_analysis().temp_size_in_bytes for name in ("nll", "squared_hinge"))
    assert ahead < nll + 4 * 128 * 8192 / 10


def test_a_bfloat16_weight_is_neither_widened_nor_written_anew_with_each_tile():
    """XLA's CPU backend would do both: a copy in float32 ahead of the loop, and a pass over all of the gradient in it."""
    shapes = (((256, 128), jnp.bfloat16), ((128, 32_768), jnp.bfloat16), ((256,), jnp.int32))
    head = compiled(jax.value_and_grad(functools.partial(linear_loss, plan="stream"), (0, 1)), *shapes)
    written = set(re.findall(r"= (\w+)\[128,32768\]\S* dynamic-update-slice", head.as_text()))
    # As bits, which stand beside the gradient at last; or, by an XLA that needs no such thing, in its place.
    bits = moved_whole(jnp.bfloat16)
    assert written == {"u16" if bits else "bf16"}
    assert head.memory_analysis().temp_size_in_bytes < (1.2 if bits else 0.2) * 2 * 128 * 32_768


@pytest.mark.parametrize("vocab", [1000, 5003, 32_768, 50_257, 50_304, 128_256, 151_936])
@pytest.mark.parametrize(("plan", "most"), [("tokens", 4096 * 9 // 8), ("stream", 512)])
def test_tiles_are_few_and_overlap_by_little(plan, most, vocab):
    """A last tile that lay over the one before it by most of its width would be a tile's work for nothing."""
    tile = explain_plan(1024, 256, vocab, LOSSES["nll"], plan=plan).tiles[1]
    count = -(-vocab // tile)
    assert 0.8 * min(most, vocab / -(-vocab // most)) <= tile <= most
    assert count * tile - vocab < 8 * count
    assert tile % 8 == 0 or tile == vocab


@cpus_alone
@pytest.mark.parametrize("tokens", [509, 502, 256])
def test_rows_that_no_block_divides_hold_as_little(tokens):
    """A prime number of them: the last block overlaps. What XLA holds is what is reckoned, the loss alone no more."""
    head = functools.partial(linear_loss, loss=lambda z, y: at_target(jax.nn.softplus(z), y), plan="tokens")
    shapes = (((tokens, 64), jnp.float32), ((64, 8192), jnp.float32), ((tokens,), jnp.int32))
    held = lambda run: compiled(run, *shapes).memory_analysis().temp_size_in_bytes
    reckoned = explain_plan(tokens, 64, 8192, lambda z, y: z, plan="tokens").temporary_bytes
    assert held(jax.value_and_grad(head, (0, 1))) < 1.1 * reckoned
    assert held(head) < 1.1 * reckoned


@cpus_alone
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["nll", "entmax15"])
def test_many_tokens_of_few_classes_are_not_held_twice(name, dtype):
    """To read a chunk of bfloat16 ones XLA would widen them all; float16's gradient waits wide, and is reckoned."""
    tokens, features, vocab = 32_768, 256, 1024
    shapes = (((tokens, features), dtype), ((features, vocab), dtype), ((tokens,), jnp.int32))
    head = functools.partial(linear_loss, loss=LOSSES[name], plan="tokens")
    reckoned = explain_plan(tokens, features, vocab, LOSSES[name], dtype, "tokens").temporary_bytes
    for run in (head, jax.value_and_grad(head, (0, 1))):
        assert compiled(run, *shapes).memory_analysis().temp_size_in_bytes < reckoned + tokens * features
