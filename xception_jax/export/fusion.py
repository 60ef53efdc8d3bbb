"""A network with few passes over its activations, for inference on a CPU, where they cost as much as its products.

XLA fuses what is elementwise, but not with a convolution: BatchNorm, ReLU and each residual sum read and write all
activations once more, and a depthwise convolution does too. Here a network whose BatchNorm is folded is traced with
its layers as marks, and what stands around each convolution,

    [ReLU] [depthwise convolution] convolution + constant [+ residual] [ReLU],

becomes one call of `cpu_kernels.folded_conv`. Which layers those are is read from the program, not from the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from xception_jax.models.layers import BatchNorm, Conv
from xception_jax.ops import cpu_kernels
from xception_jax.ops.conv import has_small_segments
from xception_jax.ops.padding import Pads, explicit_padding, output_size

# Marks in a traced program. They are never lowered: `Program` puts something in the place of each.
_CONV = jex.Primitive("conv_layer")
_SHIFT = jex.Primitive("batch_norm_constant")


@_CONV.def_abstract_eval
def _conv_shape(x, *, kernel: tuple[int, ...], stride: int, pads: Pads, **_):
    rows, columns = output_size(x.shape[1:3], kernel[:2], stride, pads)
    return jax.core.ShapedArray((x.shape[0], rows, columns, kernel[3]), x.dtype)


@_SHIFT.def_abstract_eval
def _shift_shape(x, **_):
    return jax.core.ShapedArray(x.shape, x.dtype)


def marked(affine: dict[str, tuple[np.ndarray | None, np.ndarray]]):
    """Returns a context in which layers of a folded network are marks when they are called.

    Args:
      affine: what `fold_batch_norm` left of each BatchNorm.
    """

    def mark(next_method, args, kwargs, context):
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
class _Layer:
    """A convolution and what it takes into its pass.

    Attributes:
      conv: its equation.
      x, y: variables, before and behind it all.
      depthwise: the equation of a convolution before it, depthwise or with few channels a segment.
      shifts: names of the BatchNorms whose constants are added.
      residual: a variable that is added.
      relu_first, relu_last: whether there is one.
    """

    conv: Any
    x: Any
    y: Any
    depthwise: Any = None
    shifts: tuple[str, ...] = ()
    residual: Any = None
    relu_first: bool = False
    relu_last: bool = False

    def pack(self, params: dict[str, np.ndarray], affine) -> cpu_kernels.PackedConv:
        name, segments = self.conv.params["layer"], self.conv.params["segments"]
        kernel = params[f"{name}/kernel"]
        bias = sum((affine[shift][1] for shift in self.shifts), params.get(f"{name}/bias", np.float32(0)))
        depthwise = None if self.depthwise is None else params[f"{self.depthwise.params['layer']}/kernel"]
        return cpu_kernels.pack_conv(kernel, np.broadcast_to(bias, kernel.shape[-1:]), depthwise, segments)

    def __call__(self, packed: cpu_kernels.PackedConv, x, residual):
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


class Program:
    """A traced function whose layers are marks, with as much as possible of it in the passes of its convolutions.

    Args:
      closed: of `jax.make_jaxpr`, traced in `marked`.
    """

    def __init__(self, closed):
        self._jaxpr, self._consts = closed.jaxpr, closed.consts
        self._equations = closed.jaxpr.eqns
        self._producers = {var: i for i, equation in enumerate(self._equations) for var in equation.outvars}
        self._readers: dict[Any, list[int]] = {}
        for i, equation in enumerate([*self._equations, None]):
            for var in equation.invars if equation else self._jaxpr.outvars:
                if not isinstance(var, jex.Literal):
                    self._readers.setdefault(var, []).append(i)
        self._gone: set[int] = set()
        self._layers: dict[int, _Layer] = {}
        for i, equation in enumerate(self._equations):
            if equation.primitive is _CONV and not _has_small_segments(equation):
                self._take_in(i)

    def layers(self) -> Iterator[tuple[str, _Layer]]:
        """Returns the layers with their names."""
        return ((layer.conv.params["layer"], layer) for layer in self._layers.values())

    def _only_reader(self, var) -> int | None:
        readers = self._readers.get(var, [])
        return readers[0] if len(readers) == 1 and readers[0] < len(self._equations) else None

    def _take_in(self, i: int) -> None:
        """Makes a layer of the convolution of equation i; it takes the place of the last equation that it takes in."""
        conv = self._equations[i]
        layer = _Layer(conv, conv.invars[0], conv.outvars[0])
        self._take_in_before(layer)
        place = i
        while (j := self._only_reader(layer.y)) is not None and not layer.relu_last:
            equation = self._equations[j]
            if equation.primitive is _SHIFT and layer.residual is None:
                layer.shifts += (equation.params["layer"],)
            elif equation.primitive.name == "add" and layer.residual is None and _same_shape(equation):
                layer.residual = next(var for var in equation.invars if var is not layer.y)
            elif _is_relu(equation):
                layer.relu_last = True
            else:
                break
            self._gone.add(place)
            place, layer.y = j, equation.outvars[0]
        self._layers[place] = layer

    def _take_in_before(self, layer: _Layer) -> None:
        params, i = layer.conv.params, self._producers.get(layer.x)
        pointwise = params["kernel"][:2] == (1, 1) and params["stride"] == params["segments"] == 1
        if i is None or not pointwise or self._only_reader(layer.x) is None:
            return
        depthwise = self._equations[i]
        if depthwise.primitive is not _CONV or not _has_small_segments(depthwise) or not _same_shape(depthwise):
            return
        layer.depthwise, layer.x = depthwise, depthwise.invars[0]
        self._gone.add(i)
        i = self._producers.get(layer.x)
        if i is None or i in self._layers or not _is_relu(self._equations[i]):
            return
        if self._only_reader(layer.x) is not None:
            self._gone.add(i)
        layer.relu_first, layer.x = True, self._equations[i].invars[0]

    def __call__(self, params: dict[str, Any], affine, packed: dict[str, cpu_kernels.PackedConv], *arguments):
        """Returns what the function does; `params`, `affine` and `packed` are by the name of a layer."""
        values = dict(zip(self._jaxpr.constvars, self._consts, strict=True))
        values |= dict(zip(self._jaxpr.invars, arguments, strict=True))

        def read(var):
            return var.val if isinstance(var, jex.Literal) else values[var]

        for i, equation in enumerate(self._equations):
            if (layer := self._layers.get(i)) is not None:
                residual = None if layer.residual is None else read(layer.residual)
                values[layer.y] = layer(packed[layer.conv.params["layer"]], read(layer.x), residual)
            elif i not in self._gone:
                inputs = list(map(read, equation.invars))
                outputs = self._outputs(equation, inputs, params, affine)
                values |= dict(zip(equation.outvars, outputs, strict=True))
        return list(map(read, self._jaxpr.outvars))

    def _outputs(self, equation, inputs: list, params: dict, affine) -> list:
        primitive, name = equation.primitive, equation.params.get("layer")
        if primitive is _CONV:  # with small segments, and an output that does not go straight into a pointwise one
            assert f"{name}/bias" not in params
            return [cpu_kernels.depthwise(inputs[0], jnp.asarray(params[f"{name}/kernel"]), equation.params["pads"])]
        if primitive is _SHIFT:
            return [inputs[0] + affine[name][1]]
        if (inner := _called(equation)) is not None:
            return jex.jaxpr_as_fun(inner)(*inputs)
        outputs = primitive.bind(*inputs, **equation.params)
        return outputs if primitive.multiple_results else [outputs]


def _has_small_segments(equation) -> bool:
    params = equation.params
    return params["segments"] > 1 and has_small_segments(params["kernel"], params["segments"], params["stride"])


def _same_shape(equation) -> bool:
    return all(var.aval.shape == equation.outvars[0].aval.shape for var in equation.invars)


def _called(equation):
    """Returns the program that an equation does nothing but call, if that is what it does."""
    if equation.primitive.name not in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
        return None
    return equation.params.get("jaxpr") or equation.params["call_jaxpr"]


def _is_relu(equation) -> bool:
    """Whether an equation is max(x, 0), within however many calls."""
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
    variables: dict,
    affine: dict[str, tuple[np.ndarray | None, np.ndarray]],
) -> Callable:
    """Returns `function`, jitted, in few passes over its activations.

    Args:
      function: (params, images) -> an array; calls the layers of a folded network.
      example: images of any number that it takes.
      variables: the folded 'params'.
      affine: what is left of BatchNorm; with `variables` by `fold_batch_norm`.
    """
    params = flax.traverse_util.flatten_dict(variables, sep="/")

    def trace(images) -> Program:
        with marked(affine):
            return Program(jax.make_jaxpr(lambda images: function(variables, images))(images))

    packed = {name: layer.pack(params, affine) for name, layer in trace(example).layers()}

    @jax.jit
    def run(packed, images):
        return trace(jax.ShapeDtypeStruct(images.shape, images.dtype))(params, affine, packed, images)[0]

    return lambda images: run(packed, jnp.asarray(images, jnp.float32))
