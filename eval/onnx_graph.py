"""A convolutional network as an ONNX model, written without the onnx package: what Inception needs and no more.

The network is traced by torch.fx; each operation becomes one node, with the weights inside the file. ONNX files are protocol
buffers: a sequence of (field number * 8 + wire type, value), with varints for integers and lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

# Field numbers of onnx.proto (IR version 8), opset 13.
_IR, _OPSET = 8, 13
_FLOAT, _INT, _INTS = 1, 2, 7


def to_onnx(network: nn.Module, size: int) -> bytes:
    """Returns the model as bytes, with the input "x", float32 (B, 3, size, size), and outputs "y0", "y1" ...

    Args:
        network: of convolutions, ReLUs, poolings and concatenations, float32, in inference mode; returns a tuple of tensors.
        size: pixels along each side of the input.

    Raises:
        ValueError: for an operation that has no translation here.
    """
    nodes: list[bytes] = []
    initializers: list[bytes] = []
    outputs: list[str] = []
    names: dict[fx.Node, str] = {}
    for node in fx.symbolic_trace(network).graph.nodes:
        if node.op == "placeholder":
            names[node] = "x"
        elif node.op == "output":
            outputs = [f"y{i}" for i in range(len(node.args[0]))]
            nodes += [_node("Identity", [names[a]], o) for a, o in zip(node.args[0], outputs, strict=True)]
        else:
            names[node] = node.name
            module = network.get_submodule(node.target) if node.op == "call_module" else None
            kind, attributes = _translate(node, module)
            inputs = [names[a] for a in (node.args[0] if kind == "Concat" else node.args[:1])]
            if isinstance(module, nn.Conv2d):
                parameters = {f"{node.name}.weight": module.weight, f"{node.name}.bias": module.bias}
                initializers += [_tensor(name, t) for name, t in parameters.items() if t is not None]
                inputs += [name for name, t in parameters.items() if t is not None]
            nodes.append(_node(kind, inputs, node.name, attributes))
    graph = [_message(1, n) for n in nodes] + [_text(2, "inception")] + [_message(5, t) for t in initializers]
    graph += [_message(11, _value("x", ["B", 3, size, size]))]
    graph += [_message(12, _value(name, ["B", f"{name}_c", f"{name}_h", f"{name}_w"])) for name in outputs]
    opset = _message(8, _text(1, "") + _integer(2, _OPSET))
    return _integer(1, _IR) + _text(2, "flowkit") + _message(7, b"".join(graph)) + opset


def _translate(node: fx.Node, module: nn.Module | None) -> tuple[str, dict[str, int | Sequence[int]]]:
    """ONNX's name of an operation, and its attributes."""
    if isinstance(module, nn.Conv2d):
        return "Conv", {
            "kernel_shape": _pair(module.kernel_size),
            "strides": _pair(module.stride),
            "pads": 2 * _pair(module.padding),
            "dilations": _pair(module.dilation),
            "group": module.groups,
        }
    if isinstance(module, nn.MaxPool2d):
        return "MaxPool", _window(module.kernel_size, module.stride, module.padding)
    if node.target in (F.relu, torch.relu, torch.relu_):
        return "Relu", {}
    if node.target is torch.cat:
        return "Concat", {"axis": 1}
    window = dict(zip(("kernel_size", "stride", "padding"), node.args[1:], strict=False)) | {
        key: value for key, value in node.kwargs.items() if key in ("kernel_size", "stride", "padding")
    }
    if node.target is F.avg_pool2d and node.kwargs.get("count_include_pad") is False:
        return "AveragePool", {**_window(**window), "count_include_pad": 0}
    # F.max_pool2d dispatches between functions of that name; compared by name, since the trace shows an inner one.
    if getattr(node.target, "__name__", "") == "max_pool2d" and not node.kwargs.get("ceil_mode"):
        return "MaxPool", _window(**window)
    raise ValueError(f"{node.format_node()} has no translation to ONNX here; use mode='fast'")


def _window(kernel_size: Any, stride: Any, padding: Any = 0) -> dict[str, int | Sequence[int]]:  # noqa: ANN401
    return {"kernel_shape": _pair(kernel_size), "strides": _pair(stride), "pads": 2 * _pair(padding)}


def _pair(value: Any) -> list[int]:  # noqa: ANN401
    return list(value) if isinstance(value, (tuple, list)) else [value, value]


def _node(kind: str, inputs: Iterable[str], output: str, attributes: Any = None) -> bytes:  # noqa: ANN401
    parts = [_text(1, name) for name in inputs] + [_text(2, output), _text(3, output), _text(4, kind)]
    for name, value in (attributes or {}).items():
        if isinstance(value, int):
            parts.append(_message(5, _text(1, name) + _integer(3, value) + _integer(20, _INT)))
        else:
            parts.append(_message(5, _text(1, name) + b"".join(_integer(8, v) for v in value) + _integer(20, _INTS)))
    return b"".join(parts)


def _tensor(name: str, tensor: Tensor) -> bytes:
    data = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
    dims = b"".join(_integer(1, size) for size in tensor.shape)
    return dims + _integer(2, _FLOAT) + _text(8, name) + _message(9, data)


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(_message(1, _text(2, d) if isinstance(d, str) else _integer(1, d)) for d in shape)
    tensor = _integer(1, _FLOAT) + _message(2, dims)
    return _text(1, name) + _message(2, _message(1, tensor))


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
