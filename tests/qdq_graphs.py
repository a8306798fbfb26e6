"""Small Q/DQ graphs written by hand, in and out of the form that TensorRT takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT8, UINT8, INT4 = np.dtype(np.int8), np.dtype(np.uint8), np.dtype(ml_dtypes.int4)


class QdqGraph:
    """Appends layers to a graph whose input is ``input``; each method takes and returns names of values.

    Args:
        shape: of the input; a string makes a dimension dynamic.
        opset: of the file; INT4 needs 21.
    """

    def __init__(self, shape: tuple[int | str, ...] = ("batch", 3, 16, 16), opset: int = 20) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def add(self, op_type: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}:out"], name=name, **attributes))
        return f"{name}:out"

    def constant(self, name: str, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def quantize(self, x: str, name: str, scale: float = 0.05, zero_point: int = 0, dtype: np.dtype[Any] = INT8) -> str:
        """Q/DQ of an activation."""
        numbers = [
            self.constant(f"{name}.scale", np.float32(scale)),
            self.constant(f"{name}.zero", np.array(zero_point, dtype)),
        ]
        codes = self.add("QuantizeLinear", [x, *numbers], f"{name}/QuantizeLinear")
        return self.add("DequantizeLinear", [codes, *numbers], f"{name}/DequantizeLinear")

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        dtype: np.dtype[Any] = INT8,
        axis: int | None = 0,
        block: int | None = None,
        scale: float = 0.02,
    ) -> str:
        """Stored integers -> DequantizeLinear: per channel of ``axis``, per tensor where it is None, or in blocks along it."""
        low, high = (-7, 8) if dtype == INT4 else (-127, 128)
        codes = self.constant(f"{name}.codes", self.random.integers(low, high, shape).astype(dtype))
        sizes: tuple[int, ...] = () if axis is None else (shape[axis],)
        attributes = {} if axis is None else {"axis": axis}
        if block is not None:
            assert axis is not None
            sizes = tuple(size // block if index == axis else size for index, size in enumerate(shape))
            attributes["block_size"] = block
        scales = self.random.uniform(0.5, 1.0, sizes).astype(np.float32) * np.float32(scale)
        return self.add(
            "DequantizeLinear", [codes, self.constant(f"{name}.scale", scales)], f"{name}/DequantizeLinear", **attributes
        )

    def conv(
        self, x: str, name: str, channels: tuple[int, int], kernel: int = 3, group: int = 1, stride: int = 1, **weight: Any
    ) -> str:
        """A convolution, padded to keep the image size at stride 1; ``channels`` are in and out."""
        inputs = [
            x,
            self.weight(f"{name}.weight", (channels[1], channels[0] // group, kernel, kernel), **weight),
            self._bias(name, channels[1]),
        ]
        attributes = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "strides": [stride] * 2, "group": group}
        return self.add("Conv", inputs, f"{name}/Conv", **attributes)

    def gemm(self, x: str, name: str, features: tuple[int, int], **weight: Any) -> str:
        """A linear layer as PyTorch stores it: weight (out, in), transposed by the Gemm."""
        inputs = [x, self.weight(f"{name}.weight", (features[1], features[0]), **weight), self._bias(name, features[1])]
        return self.add("Gemm", inputs, f"{name}/Gemm", transB=1)

    def matmul(self, x: str, name: str, features: tuple[int, int], **weight: Any) -> str:
        """A linear layer with its weight stored as (in, out)."""
        product = self.add("MatMul", [x, self.weight(f"{name}.weight", features, **weight)], f"{name}/MatMul")
        return self.add("Add", [product, self._bias(name, features[1])], f"{name}/Add")

    def _bias(self, name: str, size: int) -> str:
        return self.constant(f"{name}.bias", self.random.normal(size=size).astype(np.float32))

    def save(self, path: Path, output: str, rank: int = 2) -> Path:
        """Write the file; ``output``, of so many dimensions, becomes the only output."""
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [f"size{axis}" for axis in range(rank)])],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        path.write_bytes(model.SerializeToString())
        return path


def residual_net(path: Path, batch: int | str = "batch") -> Path:
    """Stem, a residual block, a depthwise convolution, global pooling, a linear layer; all convolutions quantized: 5 and 1."""
    graph = QdqGraph((batch, 3, 16, 16))
    x = graph.add("Relu", [graph.conv(graph.quantize("input", "stem.in"), "stem", (3, 16))], "stem.relu")
    block_in = graph.quantize(x, "block.in")
    y = graph.add("Relu", [graph.conv(block_in, "block.conv1", (16, 16))], "block.relu1")
    y = graph.conv(graph.quantize(y, "block.mid"), "block.conv2", (16, 16))
    shortcut = graph.quantize(graph.conv(block_in, "block.shortcut", (16, 16), kernel=1), "block.shortcut.out")
    y = graph.add("Add", [graph.quantize(y, "block.conv2.out"), shortcut], "block.add")
    y = graph.quantize(graph.add("Relu", [y], "block.relu2"), "depthwise.in")
    y = graph.add("Relu", [graph.conv(y, "depthwise", (16, 16), group=16)], "depthwise.relu")
    y = graph.add("GlobalAveragePool", [y], "pool")
    y = graph.quantize(graph.add("Flatten", [y], "flatten"), "head.in")
    return graph.save(path, graph.gemm(y, "head", (16, 10)))


def resnet18(path: Path, size: int = 64) -> Path:
    """ResNet-18 with random weights and every convolution quantized: 20, and 1 linear layer."""
    graph = QdqGraph(("batch", 3, size, size))
    x = graph.quantize("input", "stem.in")
    x = graph.quantize(graph.add("Relu", [graph.conv(x, "stem", (3, 64), kernel=7, stride=2)], "stem.relu"), "stem.out")
    x = graph.add("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            x = _basic_block(graph, x, f"stage{stage}.{block}", (width, channels), stride)
            width = channels
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x], "average")], "flatten")
    return graph.save(path, graph.gemm(graph.quantize(x, "head.in"), "head", (512, 10)))


def _basic_block(graph: QdqGraph, x: str, name: str, channels: tuple[int, int], stride: int) -> str:
    x = graph.quantize(x, f"{name}.in")
    y = graph.add("Relu", [graph.conv(x, f"{name}.conv1", channels, stride=stride)], f"{name}.relu1")
    y = graph.conv(graph.quantize(y, f"{name}.mid"), f"{name}.conv2", (channels[1], channels[1]))
    if stride != 1:
        x = graph.quantize(graph.conv(x, f"{name}.shortcut", channels, kernel=1, stride=stride), f"{name}.shortcut.out")
    y = graph.add("Add", [graph.quantize(y, f"{name}.conv2.out"), x], f"{name}.add")
    return graph.add("Relu", [y], f"{name}.relu2")
