"""Adam and AdamW as optax has them, with one division a parameter for its three: a small model's step has little else to do."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def adam(learning_rate: Any, *given: Any, **scaling: Any) -> optax.GradientTransformation:
    """`optax.adam`, to rounding of its own 1 - b2^t, with its options.

    >>> made = adam(0.1)
    >>> step, _ = made.update({"x": jnp.array(0.5)}, made.init({"x": jnp.array(2.0)}))
    >>> print(f"{step['x']:.6f}")  # the first step is the rate, against the gradient
    -0.100000
    """
    return optax.chain(_scaled(*given, **scaling), optax.scale_by_learning_rate(learning_rate))


def adamw(learning_rate: Any, *, weight_decay: Any = 1e-4, mask: Any = None, **scaling: Any) -> optax.GradientTransformation:
    """`optax.adamw`, to rounding of its own 1 - b2^t; its options by name.

    >>> made = adamw(0.1, weight_decay=0.5)
    >>> step, _ = made.update({"x": jnp.array(0.5)}, made.init({"x": jnp.array(2.0)}), {"x": jnp.array(2.0)})
    >>> print(f"{step['x']:.6f}")  # the rate, and the rate times the decay times x
    -0.200000
    """
    return optax.chain(
        _scaled(**scaling),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


# By which a recipe knows their options.
adam.__signature__, adamw.__signature__ = inspect.signature(optax.adam), inspect.signature(optax.adamw)


def _scaled(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, mu_dtype=None, *, nesterov=False):
    """`optax.scale_by_adam`: m / (sqrt(v) + eps) of debiased means, in the order that Kingma & Ba 2015 end section 2 with.

    What debiases is one number a step: taken out of the root and of the quotient, it is multiplied in once.
    """
    theirs = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    traced = any(isinstance(each, jax.core.Tracer) for each in (b1, b2, eps, eps_root))  # by optax.inject_hyperparams
    if traced or eps_root or mu_dtype is not None or nesterov or not 0 < b2 < 1 or not 0 <= b1 < 1:
        return theirs

    def update(gradient, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(gradient, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradient, state.nu, b2, 2)
        # Not 1 - b^t, of which float32 leaves four digits at the first steps.
        of_one, root = -jnp.expm1(count * math.log(b1)) if b1 else 1.0, jnp.sqrt(-jnp.expm1(count * math.log(b2)))
        scale, least = root / of_one, eps * root

        def step(m, v):
            dtype = m.dtype
            if dtype.itemsize < 4:  # float16 has no such eps, and of nothing it would make 0 / 0
                m, v = m.astype(jnp.float32), v.astype(jnp.float32)
            return (scale.astype(m.dtype) * m / (jnp.sqrt(v) + least.astype(v.dtype))).astype(dtype)

        return jax.tree.map(step, mu, nu), optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(theirs.init, update)
