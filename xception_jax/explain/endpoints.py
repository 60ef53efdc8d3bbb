"""Cuts a network at one of its endpoints, to differentiate its logits with respect to the activation there.

The cut is made in the traced program, so networks need no hooks, and it works for any module that returns
`(logits, endpoints)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.extend.core as jex
from jax.core import eval_jaxpr
from jaxtyping import Array, Float

MIN_SIDE = 4
"""Positions a side of a map that is worth drawing. Networks for small images end in a single position."""


def spatial_endpoints(endpoints: Mapping[str, Array], min_side: int = 1) -> list[str]:
    """Returns the names of the endpoints that have positions [b, h, w, c], in the order of the forward pass."""
    return [name for name, value in endpoints.items() if value.ndim == 4 and min(value.shape[1:3]) >= min_side]


def list_endpoints(model: nn.Module, variables: Mapping[str, Any], image_size: int, min_side: int = 1) -> list[str]:
    """Returns the names of the endpoints of a network with at least `min_side` positions a side, without running it."""
    names: list[str] = []

    def record(variables: Mapping[str, Any], images: Array) -> None:
        # An array of the result would lose the order: JAX sorts the keys of dicts.
        outputs: Any = model.apply(variables, images, train=False)
        names.extend(spatial_endpoints(outputs[1], min_side))

    jax.eval_shape(record, variables, jax.ShapeDtypeStruct((1, image_size, image_size, 3), "float32"))
    return names


def last_drawable(model: nn.Module, variables: Mapping[str, Any], image_size: int) -> str:
    """Returns the last endpoint with at least `MIN_SIDE` positions a side, else the last endpoint."""
    return (list_endpoints(model, variables, image_size, MIN_SIDE) or list_endpoints(model, variables, image_size))[-1]


def cut(
    model: nn.Module, variables: Mapping[str, Any], images: Float[Array, "b s s 3"], endpoint: str | None
) -> tuple[Float[Array, "b h w c"], Callable[[Float[Array, "b h w c"]], Float[Array, "b n"]]]:
    """Returns the activation at an endpoint, and the rest of the network: a function from it to the logits.

    Args:
      model: a module whose `apply(variables, images, train=False)` returns `(logits, endpoints)`.
      variables: its variables.
      images: preprocessed images.
      endpoint: name of an endpoint; None is the last one that has positions.

    Raises:
      KeyError: there is no such endpoint.
      ValueError: the endpoint has no positions, or it is computed inside a transformation such as `jax.checkpoint`.
    """

    def forward(variables: Mapping[str, Any], images: Array) -> tuple[Array, Array]:
        outputs: Any = model.apply(variables, images, train=False)
        logits, endpoints = outputs
        return logits, endpoints[endpoint or spatial_endpoints(endpoints)[-1]]

    program = jax.make_jaxpr(forward)(variables, images)
    jaxpr, arguments = program.jaxpr, jax.tree.leaves((variables, images))
    logits, activation = jaxpr.outvars
    if activation.aval.ndim != 4:
        raise ValueError(f"the endpoint {endpoint!r} has no positions: its shape is {activation.aval.shape}")
    if not any(activation in equation.outvars for equation in jaxpr.eqns):
        raise ValueError(f"the endpoint {endpoint!r} is not an operation of the traced network")
    # The activation becomes a constant of the program.
    constants, equations = [*jaxpr.constvars, activation], _equations_between(jaxpr, activation, logits)
    rest = jaxpr.replace(constvars=constants, eqns=equations)

    def logits_of(value: Array) -> Array:
        return eval_jaxpr(rest, [*program.consts, value], *arguments)[0]

    return eval_jaxpr(jaxpr, program.consts, *arguments)[1], logits_of


def _equations_between(jaxpr: jex.Jaxpr, start: Any, end: Any) -> list[jex.JaxprEqn]:
    """Returns the equations that compute `end`, in order, without those that compute `start`."""
    needed, kept = {end}, []
    for equation in reversed(jaxpr.eqns):
        if start not in equation.outvars and not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed.update(each for each in equation.invars if not isinstance(each, jex.Literal))
    return kept[::-1]
