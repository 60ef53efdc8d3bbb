"""Translates a network from its jaxpr to an ONNX graph.

Images are NHWC, as in the whole package. Inside the graph all activations with four axes are NCHW, the layout of ONNX
convolutions, so there is one transposition at the start. All values that do not depend on the images are computed
during translation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from xception_jax.errors import InputMissingError, UsageError
from xception_jax.export.inference import make_inference
from xception_jax.ops.padding import Pads
from xception_jax.weights.network import Network

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError:
    raise InputMissingError(
        "the package onnx is not installed", "--format=onnx", "pip install onnx onnxruntime"
    ) from None

OPSET = 18
_IR_VERSION = 8  # introduced with opset 18, so a runtime that supports the opset supports it
_MAX_BYTES = 2**31 - 1  # limit of protocol buffers

_ELEMENTWISE = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max"}
_ACTIVATIONS = {"relu": "Relu", "elu": "Elu"}  # functions of jax.nn, which a jaxpr calls by name


def to_onnx(network: Network, *, uint8: bool = False) -> bytes:
    """Returns an ONNX model from 'images' [b, s, s, 3] to 'logits' [b, num_classes], for any b.

    Raises:
      UsageError: the model has more than 2 GB.
    """
    size, num_classes = network.preprocessing.size, network.model.num_classes
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8 if uint8 else jnp.float32)
    jaxpr = jax.make_jaxpr(make_inference(network, uint8=uint8, native=True))(images)
    graph = _Graph()
    (logits,) = graph.translate(jaxpr.jaxpr, jaxpr.consts, [graph.add("Transpose", "images", perm=[0, 3, 1, 2])])
    graph.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    input_type = TensorProto.UINT8 if uint8 else TensorProto.FLOAT
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            network.model.name,
            [helper.make_tensor_value_info("images", input_type, ["b", size, size, 3])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", num_classes])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name="xception_jax",
    )
    if model.ByteSize() > _MAX_BYTES:
        what = f"the network has {model.ByteSize():,} bytes, which exceeds the limit of a single ONNX file"
        raise UsageError(what, "--format=onnx", "use --format=stablehlo or --format=safetensors")
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


class _Graph:
    """Nodes and constants of a graph under construction.

    A value is either the name (str) of the output of a node, or an array that does not depend on the images. Outputs
    of nodes with four axes are NCHW. Arrays are NHWC, as in the jaxpr, until a node uses them.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """Adds a node with one output and returns the name of the output."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], output, **attributes))
        return output

    def constant(self, array: np.ndarray) -> str:
        """Stores an array and returns its name."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def translate(self, jaxpr: Jaxpr, constants: list, inputs: list) -> list:
        """Adds the equations of a jaxpr and returns the values of its outputs."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(variable: Any) -> Any:
            if isinstance(variable, Literal):
                return np.asarray(variable.val, jnp.result_type(variable.val))
            return values[variable]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(variable) for variable in equation.invars])
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list) -> list:
        name, params = equation.primitive.name, equation.params
        if name == "platform_index":
            return [_DEFAULT_PLATFORM]
        if name == "cond" and inputs[0] is _DEFAULT_PLATFORM:
            branch = params["branches"][-1]
            return self.translate(branch.jaxpr, branch.consts, inputs[1:])
        if params.get("name") in _ACTIVATIONS and isinstance(inputs[0], str):
            return [self.add(_ACTIVATIONS[params["name"]], inputs[0])]
        inner = params.get("jaxpr") or params.get("call_jaxpr")
        if inner is not None:
            return self.translate(inner.jaxpr, inner.consts, inputs)
        if not any(isinstance(value, str) for value in inputs):
            outputs = equation.primitive.bind(*inputs, **params)
            return list(map(np.asarray, outputs if equation.primitive.multiple_results else [outputs]))
        rank = len(equation.outvars[0].aval.shape)
        if name in _ELEMENTWISE:
            operands = [value if isinstance(value, str) else _channels_first(value, rank) for value in inputs]
            return [self.add(_ELEMENTWISE[name], *operands)]
        if name not in _TRANSLATIONS:
            raise NotImplementedError(f"no translation of {name} to ONNX: {equation}")
        return [_TRANSLATIONS[name](self, inputs, params, equation)]


# The platform that `lax.platform_dependent` sees here: none of those with their own lowering.
_DEFAULT_PLATFORM = object()


def _channels_first(array: np.ndarray, rank: int) -> np.ndarray:
    """Returns an operand in the layout of an activation with `rank` axes."""
    if rank != 4 or array.ndim == 0:
        return array
    return array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(0, 3, 1, 2)


def _axis(axis: int, rank: int) -> int:
    return (0, 2, 3, 1)[axis] if rank == 4 else axis


def _pads(padding: Pads) -> list[int]:
    """Returns ((top, bottom), (left, right)) in the order of ONNX."""
    (top, bottom), (left, right) = padding
    return [top, left, bottom, right]


def _conv(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    kernel = inputs[1].transpose(3, 2, 0, 1)  # HWIO to OIHW
    return graph.add(
        "Conv",
        inputs[0],
        kernel,
        kernel_shape=kernel.shape[2:],
        strides=params["window_strides"],
        pads=_pads(params["padding"]),
        group=params["feature_group_count"],
    )


def _window(params: dict) -> dict[str, Any]:
    return {
        "kernel_shape": params["window_dimensions"][1:3],
        "strides": params["window_strides"][1:3],
        "pads": _pads(params["padding"][1:3]),
    }


def _max_pool(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    return graph.add("MaxPool", inputs[0], **_window(params))


def _window_sum(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    mean = graph.add("AveragePool", inputs[0], count_include_pad=1, **_window(params))
    return graph.add("Mul", mean, np.float32(np.prod(params["window_dimensions"])))


def _sum(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    rank = len(equation.invars[0].aval.shape)
    axes = np.asarray([_axis(axis, rank) for axis in params["axes"]], np.int64)
    return graph.add("ReduceSum", inputs[0], axes, keepdims=0)


def _concatenate(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    rank = len(equation.outvars[0].aval.shape)
    return graph.add("Concat", *inputs, axis=_axis(params["dimension"], rank))


def _dot(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    return graph.add("MatMul", *inputs)


def _cast(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    return graph.add("Cast", inputs[0], to=helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"])))


def _square(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    return graph.add("Mul", inputs[0], inputs[0])


def _rsqrt(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    return graph.add("Pow", inputs[0], np.float32(-0.5))


def _broadcast(graph: _Graph, inputs: list, params: dict, equation: Any) -> str:
    """Adds axes of size one to a number for each image, [b] to [b, 1, 1, 1]."""
    rank = len(equation.outvars[0].aval.shape)
    if equation.invars[0].aval.ndim != 1 or params["broadcast_dimensions"] != (0,):
        raise NotImplementedError(f"no translation of this broadcast to ONNX: {equation}")
    return graph.add("Unsqueeze", inputs[0], np.arange(1, rank))


_TRANSLATIONS: dict[str, Callable[[_Graph, list, dict, Any], str]] = {
    "conv_general_dilated": _conv,
    "reduce_window_max": _max_pool,
    "reduce_window_sum": _window_sum,
    "reduce_sum": _sum,
    "square": _square,
    "rsqrt": _rsqrt,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dot_general": _dot,
    "convert_element_type": _cast,
}
