"""Fuses each convolution with the operations around it into one CPU kernel.

At inference on a CPU, reading and writing activations costs as much as arithmetic. XLA fuses elementwise operations
with each other but not with a convolution, so BatchNorm, ReLU, each residual sum and each depthwise convolution make
another pass over the activations. This module traces a network with folded BatchNorm, in which layers are marks, and
turns each

    [ReLU] [depthwise convolution] convolution + constant [+ residual] [ReLU]

into one call of `cpu_kernels.folded_conv`. It finds these patterns in the program, so it works for any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn

from xception_jax.models.layers import BatchNorm, Conv
from xception_jax.ops import cpu_kernels
from xception_jax.ops.conv import has_small_segments
from xception_jax.ops.padding import Pads, explicit_padding, output_size

# The rest of each BatchNorm by its name: (factor, constant) per channel; a convolution has taken a factor that is None.
Affine = dict[str, tuple[np.ndarray | None, np.ndarray]]

# Marks in a traced program. They are never lowered, because `FusedProgram` replaces each of them.
_CONV = jex.Primitive("conv_layer")
_SHIFT = jex.Primitive("batch_norm_constant")


@_CONV.def_abstract_eval
def _conv_shape(x: ShapedArray, *, kernel: tuple[int, ...], stride: int, pads: Pads, **_: Any) -> ShapedArray:
    rows, columns = output_size(x.shape[1:3], kernel[:2], stride, pads)
    return ShapedArray((x.shape[0], rows, columns, kernel[3]), x.dtype)


@_SHIFT.def_abstract_eval
def _shift_shape(x: ShapedArray, **_: Any) -> ShapedArray:
    return ShapedArray(x.shape, x.dtype)


def marked(affine: Affine) -> AbstractContextManager[None]:
    """Returns a context in which calls of the layers of a folded network leave marks in the traced program.

    Args:
      affine: the rest of each BatchNorm, from `fold_batch_norm`.
    """

    def mark(next_method: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        layer, name = context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or not isinstance(layer, Conv | BatchNorm):
            return next_method(*args, **kwargs)
        if isinstance(layer, BatchNorm):
            factor, constant = affine[name]
            return _SHIFT.bind(args[0], layer=name) if factor is None else args[0] * factor + constant
        kernel: tuple[int, ...] = layer.get_variable("params", "kernel").shape
        pads = explicit_padding(layer.padding, args[0].shape[1:3], kernel[:2], layer.stride)
        return _CONV.bind(args[0], layer=name, kernel=kernel, segments=layer.segments, stride=layer.stride, pads=pads)

    return nn.intercept_methods(mark)


@dataclasses.dataclass
class _FusedConv:
    """A convolution with the operations that are fused into it.

    Attributes:
      conv: the equation of the convolution.
      x: the input variable of the fused operations.
      y: their output variable.
      depthwise: the equation of a convolution before it, depthwise or with few channels per segment.
      shifts: names of the BatchNorms whose constants are added.
      residual: a variable that is added.
      relu_first: whether a ReLU comes first.
      relu_last: whether a ReLU comes last.
    """

    conv: Any
    x: Any
    y: Any
    depthwise: Any = None
    shifts: tuple[str, ...] = ()
    residual: Any = None
    relu_first: bool = False
    relu_last: bool = False

    def pack(self, params: dict[str, np.ndarray], affine: Affine) -> cpu_kernels.PackedConv:
        """Returns the weights in the layout of the kernel."""
        name, segments = self.conv.params["layer"], self.conv.params["segments"]
        kernel = params[f"{name}/kernel"]
        bias = sum((affine[shift][1] for shift in self.shifts), params.get(f"{name}/bias", np.float32(0)))
        depthwise = None if self.depthwise is None else params[f"{self.depthwise.params['layer']}/kernel"]
        return cpu_kernels.pack_conv(kernel, np.broadcast_to(bias, kernel.shape[-1:]), depthwise, segments)

    def __call__(self, packed: cpu_kernels.PackedConv, x: Array, residual: Array | None) -> Array:
        """Runs the kernel."""
        geometry = (self.depthwise or self.conv).params
        return cpu_kernels.folded_conv(
            x,
            packed,
            residual,
            window=self.conv.params["kernel"][:2],
            filters=self.conv.params["kernel"][3],
            segments=self.conv.params["segments"],
            stride=geometry["stride"],
            pads=geometry["pads"],
            relu_first=self.relu_first,
            relu_last=self.relu_last,
        )


class FusedProgram:
    """A traced function with as many operations as possible fused into its convolutions.

    Args:
      closed: the result of `jax.make_jaxpr`, traced in `marked`.
    """

    def __init__(self, closed: ClosedJaxpr):
        self._jaxpr, self._consts = closed.jaxpr, closed.consts
        self._equations = closed.jaxpr.eqns
        self._producers = {var: i for i, equation in enumerate(self._equations) for var in equation.outvars}
        self._readers: dict[Any, list[int]] = {}
        for i, equation in enumerate([*self._equations, None]):
            for var in equation.invars if equation else self._jaxpr.outvars:
                if not isinstance(var, jex.Literal):
                    self._readers.setdefault(var, []).append(i)
        self._fused: set[int] = set()  # equations that a layer replaces
        self._layers: dict[int, _FusedConv] = {}
        for i, equation in enumerate(self._equations):
            if equation.primitive is _CONV and not _has_small_segments(equation):
                self._fuse(i)

    def layers(self) -> Iterator[tuple[str, _FusedConv]]:
        """Returns the names of the convolutions, with each fused convolution."""
        return ((layer.conv.params["layer"], layer) for layer in self._layers.values())

    def _only_reader(self, var: Any) -> int | None:
        """Returns the number of the only equation that reads a variable; None if there are others, or an output."""
        readers = self._readers.get(var, [])
        return readers[0] if len(readers) == 1 and readers[0] < len(self._equations) else None

    def _fuse(self, i: int) -> None:
        """Fuses operations into the convolution of equation i. It runs in place of the last of them."""
        conv = self._equations[i]
        layer = _FusedConv(conv, conv.invars[0], conv.outvars[0])
        self._fuse_before(layer)
        place = i
        while (j := self._only_reader(layer.y)) is not None and not layer.relu_last:
            equation = self._equations[j]
            if j in self._fused or j in self._layers:  # the sum of two convolutions belongs to the first of them
                break
            if equation.primitive is _SHIFT and layer.residual is None:
                layer.shifts += (equation.params["layer"],)
            elif equation.primitive.name == "add" and layer.residual is None and _same_shape(equation):
                layer.residual = next(var for var in equation.invars if var is not layer.y)
            elif _is_relu(equation):
                layer.relu_last = True
            else:
                break
            self._fused.add(place)
            place, layer.y = j, equation.outvars[0]
        self._layers[place] = layer

    def _fuse_before(self, layer: _FusedConv) -> None:
        """Fuses a depthwise convolution, and a ReLU before it, into a pointwise convolution."""
        params, i = layer.conv.params, self._producers.get(layer.x)
        pointwise = params["kernel"][:2] == (1, 1) and params["stride"] == params["segments"] == 1
        if i is None or not pointwise or self._only_reader(layer.x) is None:
            return
        depthwise = self._equations[i]
        if depthwise.primitive is not _CONV or not _has_small_segments(depthwise) or not _same_shape(depthwise):
            return
        layer.depthwise, layer.x = depthwise, depthwise.invars[0]
        self._fused.add(i)
        i = self._producers.get(layer.x)
        if i is None or i in self._layers or not _is_relu(self._equations[i]):
            return
        if self._only_reader(layer.x) is not None:
            self._fused.add(i)
        layer.relu_first, layer.x = True, self._equations[i].invars[0]

    def __call__(
        self, params: dict[str, Any], affine: Affine, packed: dict[str, cpu_kernels.PackedConv], *arguments: Array
    ) -> list[Array]:
        """Evaluates the function; `params`, `affine` and `packed` are by layer name."""
        values = dict(zip(self._jaxpr.constvars, self._consts, strict=True))
        values |= dict(zip(self._jaxpr.invars, arguments, strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, jex.Literal) else values[var]

        for i, equation in enumerate(self._equations):
            if (layer := self._layers.get(i)) is not None:
                residual = None if layer.residual is None else read(layer.residual)
                values[layer.y] = layer(packed[layer.conv.params["layer"]], read(layer.x), residual)
            elif i not in self._fused:
                inputs = list(map(read, equation.invars))
                outputs = self._outputs(equation, inputs, params, affine)
                values |= dict(zip(equation.outvars, outputs, strict=True))
        return list(map(read, self._jaxpr.outvars))

    def _outputs(self, equation: JaxprEqn, inputs: list, params: dict[str, Any], affine: Affine) -> list:
        """Evaluates an equation that is not part of a fused convolution."""
        primitive, name = equation.primitive, equation.params.get("layer", "")
        if primitive is _CONV:  # with small segments, and not directly followed by a pointwise one
            assert f"{name}/bias" not in params
            return [cpu_kernels.depthwise(inputs[0], jnp.asarray(params[f"{name}/kernel"]), equation.params["pads"])]
        if primitive is _SHIFT:
            return [inputs[0] + affine[name][1]]
        if (inner := _called(equation)) is not None:
            return jex.jaxpr_as_fun(inner)(*inputs)
        outputs = primitive.bind(*inputs, **equation.params)
        return outputs if primitive.multiple_results else [outputs]


def _has_small_segments(equation: JaxprEqn) -> bool:
    params = equation.params
    return params["segments"] > 1 and has_small_segments(params["kernel"], params["segments"], params["stride"])


def _same_shape(equation: JaxprEqn) -> bool:
    variables: list[Any] = [*equation.invars, *equation.outvars]
    return len({variable.aval.shape for variable in variables}) == 1


def _called(equation: JaxprEqn) -> ClosedJaxpr | None:
    """Returns the program that an equation calls, if it is a plain call."""
    if equation.primitive.name not in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
        return None
    return equation.params.get("jaxpr") or equation.params["call_jaxpr"]


def _is_relu(equation: JaxprEqn) -> bool:
    """Returns whether an equation is max(x, 0), possibly inside nested calls."""
    while (inner := _called(equation)) is not None:
        if len(inner.jaxpr.eqns) != 1:
            return False
        equation = inner.jaxpr.eqns[0]
    if equation.primitive.name != "max":
        return False
    zeros = [var for var in equation.invars if isinstance(var, jex.Literal)]
    return len(zeros) == 1 and np.ndim(zeros[0].val) == 0 and zeros[0].val == 0


def fuse(
    function: Callable,
    example: jax.ShapeDtypeStruct,
    variables: dict[str, Any],
    affine: Affine,
) -> Callable[[Array], Array]:
    """Returns `function`, jitted, with each convolution fused with the operations around it.

    Args:
      function: takes (params, images), calls the layers of a folded network and returns an array.
      example: images with any batch size.
      variables: the folded parameters, from `fold_batch_norm`.
      affine: the rest of each BatchNorm, from `fold_batch_norm`.
    """
    params = flax.traverse_util.flatten_dict(variables, sep="/")

    def trace(images: jax.ShapeDtypeStruct) -> FusedProgram:
        with marked(affine):
            return FusedProgram(jax.make_jaxpr(lambda images: function(variables, images))(images))

    packed = {name: layer.pack(params, affine) for name, layer in trace(example).layers()}

    @jax.jit
    def run(packed: dict[str, cpu_kernels.PackedConv], images: Array) -> Array:
        return trace(jax.ShapeDtypeStruct(images.shape, images.dtype))(params, affine, packed, images)[0]

    return lambda images: run(packed, jnp.asarray(images, jnp.float32))
