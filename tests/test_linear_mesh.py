"""The head on meshes: 8 virtual devices against one, what the compiled program sends, and two real processes."""

import functools
import inspect
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentlab import LOSSES, LabError
from xentlab.linear import linear_log_probs, linear_loss
from xentlab.linear.costs import collectives
from xentlab.mesh import parse_mesh

TRAINS = True
TOKENS, FEATURES, VOCAB = 23, 5, 96


def loss_of(name, s):
    """Of "nll*" that of s times the logits, by rows; of "focal:gamma" that with s for the setting; else s is left alone."""
    if name == "normed":  # without a derivative where all logits are 0
        return lambda logits, targets: LOSSES["nll"](3 * logits / jnp.linalg.norm(logits, axis=-1, keepdims=True), targets)
    stem, _, setting = name.partition(":")
    if setting:
        return functools.partial(LOSSES[stem], **{setting: s})
    return (lambda logits, targets: LOSSES[stem[:-1]](logits * s, targets)) if stem.endswith("*") else LOSSES[stem]


def total_of(case, h, w, b, t, s, y, mesh=None):
    """A case's results in one number. A plan with "/turned" has the weight [V, D]."""
    name, plan, reduction = case
    plan, _, turned = plan.partition("/")
    more = {"bias": b, "tiles": (4, 7), "softcap": 4.0, "vocab_first": bool(turned), "mesh": mesh}
    if reduction == "log_probs":
        each = jnp.concatenate(linear_log_probs(h, w.T if turned else w, y, **more))
    else:
        kind = {"loss": loss_of(name, s), "plan": plan, "reduction": reduction, "token_weights": t}
        each = linear_loss(h, w.T if turned else w, y, **kind, **more)
    return jnp.sum(each * jnp.cos(jnp.arange(each.size)).reshape(each.shape))


# What runs where the devices are: a process of its own, for JAX counts a CPU's devices once.
WORKER = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
rank, port, shape = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
TOKENS, FEATURES, VOCAB = json.loads(sys.argv[5])
jax.config.update("jax_num_cpu_devices", 8 if rank < 0 else 4)
if rank >= 0:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank, initialization_timeout=60)
from xentlab import LOSSES, linear_log_probs, linear_loss

rng = np.random.default_rng(0)
hidden, weight = rng.normal(size=(TOKENS, FEATURES)), rng.normal(size=(FEATURES, VOCAB))
targets, bias, weights = rng.integers(0, VOCAB, TOKENS), rng.normal(size=VOCAB), rng.random(TOKENS)
weights[3] = 0
mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
cases = json.loads(sys.argv[4])

@functools.partial(jax.jit, out_shardings=whole)
def run(*arrays):
    return [jax.value_and_grad(functools.partial(total_of, case, mesh=mesh), range(5))(*arrays) for case in cases]

place = lambda array, dtype: jax.make_array_from_callback(array.shape, whole, lambda at: array[at].astype(dtype))
arrays = [place(each, np.float32) for each in (hidden, weight, bias, weights)]
arrays.append(np.float32(0.3))
if len(sys.argv) > 6:  # the form that another chip would get
    jax.default_backend = lambda: sys.argv[6]
found = run(*arrays, place(targets, np.int32))
if rank <= 0:
    plain = lambda value, gradients: [np.asarray(each).tolist() for each in (value, *gradients)]
    print(json.dumps({" ".join(case): plain(*each) for case, each in zip(cases, found, strict=True)}))
"""


@functools.cache
def expected(name, plan, reduction):
    """The same on one device."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(TOKENS, FEATURES)), rng.normal(size=(FEATURES, VOCAB))]
    targets = jnp.asarray(rng.integers(0, VOCAB, TOKENS), jnp.int32)
    arrays += [rng.normal(size=VOCAB), rng.random(TOKENS)]
    arrays[3][3] = 0
    total = lambda *arrays: total_of((name, plan, reduction), *arrays, targets)
    arrays += [np.array(0.3)]
    value, gradients = jax.jit(jax.value_and_grad(total, range(5)))(*[jnp.asarray(each, jnp.float32) for each in arrays])
    return value, *gradients


def start(rank, port, shape, cases, *form):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", inspect.getsource(loss_of) + inspect.getsource(total_of) + WORKER]
    command += [str(rank), str(port), json.dumps(shape), json.dumps(cases)]
    command += [json.dumps([TOKENS, FEATURES, VOCAB]), *form]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(*processes):
    """The first one's results; an error of any ends the test with its words."""
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


def check(found):
    for case, arrays in found.items():
        for each, right in zip(arrays, expected(*case.split()), strict=True):
            size = float(jnp.max(jnp.abs(right)))
            np.testing.assert_allclose(np.asarray(each, np.float32), right, rtol=0, atol=1e-5 * size, err_msg=case)


CASES = [["nll", "stream", "mean"], ["hinge", "stream", "none"], ["confidence_penalty", "stream", "mean"]]
CASES += [["mse_logits", "stream", "none"], ["brier", "tokens", "mean"], ["entmax15", "tokens", "mean"]]
CASES += [["entmax15", "tokens", "none"], ["focal", "tokens", "none"], ["squared_hinge", "stream", "mean"]]

# What a loss closes over is learned as well.
CASES += [["entmax15*", "tokens", "mean"], ["label_smoothing:epsilon", "tokens", "none"], ["poly1:epsilon", "stream", "mean"]]
# The weight turned; and a loss of which tokens that are out, and those that fill up a device's share, must be far from 0.
CASES += [["nll", "stream/turned", "log_probs"], ["brier", "tokens/turned", "mean"], ["normed", "tokens", "mean"]]


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 8)])
def test_eight_devices_equal_one(shape):
    found = finish(start(-1, 0, shape, CASES))
    assert len(found) == len(CASES)
    check(found)


def test_the_form_for_other_chips_is_right_on_a_mesh():
    found = finish(start(-1, 0, (2, 4), [*CASES[4:6], *CASES[9:11]], "gpu"))
    assert len(found) == 4
    check(found)


def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cases = [CASES[0], CASES[4], CASES[5], CASES[9], ["nll", "auto", "mean"]]
    found = finish(*[start(rank, port, (2, 4), cases) for rank in (0, 1)])
    assert len(found) == len(cases)
    check(found)


def test_what_a_loss_closes_over_may_not_lie_on_the_mesh():
    """JAX lets nothing of another kind of mesh into a device's part of it."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arrays, on_mesh = (jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32)), jax.NamedSharding(mesh, jax.P())
    head = jax.jit(lambda s, **more: linear_loss(*arrays, loss=loss_of("nll*", s), mesh=mesh, **more))
    assert float(head(jnp.float32(1))) == pytest.approx(np.log(4))
    placed = jax.device_put(jnp.float32(1), on_mesh)
    for run in (
        head,
        lambda _: jax.jit(lambda h: linear_loss(h, *arrays[1:], loss=loss_of("nll*", placed), mesh=mesh))(arrays[0]),
    ):
        with pytest.raises(LabError, match="lies on a mesh"):
            run(placed)


def plan(*arguments):
    """What the command says, in a process whose devices it may still choose."""
    command = [sys.executable, "-c", "from xentlab.cli import main; main()", "plan", "--format", "json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["head"]: row for row in json.loads(done.stdout)}


def test_stream_sends_only_what_it_must():
    """From the compiled module: no logits and no weight travel, [tokens] numbers and the two gradients do."""
    tokens, features, vocab, data, model = 2048, 64, 8192, 2, 4
    shape = ("--tokens", str(tokens), "--features", str(features), "--vocab", str(vocab))
    found = plan(*shape, "--mesh", f"data={data},model={model}")
    sent = found["stream"]["sent"]
    assert set(sent) == {"all-reduce"}
    ring = lambda size, devices: 2 * size * (devices - 1) / devices
    hidden = ring(4 * tokens / data * features, model)
    weight = ring(4 * features * vocab / model, data)
    # Target, the greatest logit and the mass: three numbers a token; the loss itself is one.
    assert sent["all-reduce"] == pytest.approx(hidden + weight + ring(3 * 4 * tokens / data, model), rel=1e-3)
    assert sum(each["taken_by_auto"] for each in found.values()) == 1
    trade = plan(*shape, "--mesh", f"data={data},model={model}", "--loss", "entmax15")["tokens"]["sent"]["all-to-all"]
    assert trade == pytest.approx(2 * 4 * tokens / data * vocab / model * (model - 1) / model, rel=1e-6)


WEIGHTED = """
import json, jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from xentlab import linear_loss
from xentlab.linear.costs import collectives
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
shaped = [jax.ShapeDtypeStruct(*each) for each in (((4096, 64), "float32"), ((64, 512), "float32"), ((4096,), "int32"))]
shaped.append(jax.ShapeDtypeStruct((4096,), "float32"))
places, found = (place("data"), place(None, "model"), place("data"), place("data")), []
for plan in ("stream", "tokens"):
    head = lambda h, w, y, t: linear_loss(h, w, y, token_weights=t, plan=plan, mesh=mesh)
    run = jax.jit(jax.value_and_grad(head, (0, 1)), in_shardings=places, out_shardings=(place(), places[:2]))
    found.append(collectives(run.lower(*shaped).compile().as_text()))
print(json.dumps(found))
"""


def test_tokens_that_are_out_send_no_hidden_states():
    """They are copies of one that counts, which an index would have every device gather all of them for."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", WEIGHTED], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for sent in json.loads(done.stdout):
        assert set(sent) <= {"all-reduce", "all-gather"}
        assert sent.get("all-gather", 0) < 100  # where the first token that counts is
        # Both gradients, and some numbers a token.
        assert sent["all-reduce"] < 4 * (4096 / 4 * 64 + 2 * 64 * 256) + 4096 * 4 * 4


def test_a_plan_for_256_devices():
    found = plan("--tokens", "8192", "--features", "256", "--vocab", "256000", "--mesh", "data=8,model=32", "--loss", "brier")
    assert found["stream"]["temporary_bytes"] < found["tokens"]["temporary_bytes"] < found["naive"]["temporary_bytes"]
    assert found["stream"]["flops"] == 4 * 2 * 1024 * 256 * 8000


def test_loops_count_as_often_as_they_run():
    module = """HloModule m
%body (p: f32[4]) -> f32[4] {
  %a = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %g = bf16[8]{0} all-gather(%w), replica_groups=mesh['x'=2,'y'=4] {'x'}, dimensions={0}
  %t = (f32[2]{0}, f32[2]{0}) all-to-all(%w, %w), replica_groups={{0,1},{2,3}}
  %s = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %r = f32[4]{0} reduce-scatter(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %c = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%w), source_target_pairs={{0,1},{1,0}}
}
"""
    sent = {"all-reduce": 5 * 24, "all-gather": 8 + 12, "all-to-all": 8, "reduce-scatter": 48, "collective-permute": 16}
    assert collectives(module) == sent


@pytest.mark.parametrize("text", ["data", "data=0", "rows=3", "data=2,data=2", "data=2;model=2", "model=x"])
def test_meshes_are_written_one_way(text):
    with pytest.raises(LabError, match="a mesh is written"):
        parse_mesh(text)


def test_meshes_that_do_not_fit_are_told():
    devices = np.array(jax.devices()[:1])
    auto = jax.sharding.Mesh(devices, ("rows",))
    explicit = jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(LabError, match=r"has explicit axes.*AxisType.Auto,\) \* 1"):
        linear_loss(jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.array([0, 1]))
    head = lambda mesh, **axes: linear_loss(jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.array([0, 1]), mesh=mesh, **axes)
    with pytest.raises(LabError, match="axes are rows; token_axis is 'data', vocab_axis 'model'"):
        head(auto)
    with pytest.raises(LabError, match=r"has explicit axes.*AxisType.Auto,\) \* 1"):
        head(explicit)
    with pytest.raises(LabError, match="Name one axis of yours"):
        head(jax.sharding.Mesh(devices, ("data",)), token_axis="rows")
    with pytest.raises(LabError, match="split over two axes; both are 'data'"):
        head(jax.sharding.Mesh(devices, ("data",)), vocab_axis="data")


@pytest.mark.parametrize("which", range(5))
def test_an_array_that_lies_on_an_explicit_mesh_is_told(which):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    arrays = [jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.array([0, 1]), jnp.ones(5), jnp.ones(2)]
    arrays[which] = jax.device_put(arrays[which], place)
    loss = lambda h, w, y, b, t: linear_loss(h, w, y, bias=b, token_weights=t)
    log_probs = lambda h, w, y, b, t: linear_log_probs(h, w, y, bias=b)
    for run in (loss, jax.jit(loss), *([] if which == 4 else [log_probs])):
        with pytest.raises(LabError, match=r"has explicit axes.*AxisType.Auto,\) \* 1"):
            run(*arrays)
