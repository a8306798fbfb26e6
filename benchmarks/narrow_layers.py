"""From how many channels on ONNX Runtime's integer convolutions are faster than its float ones on this machine.

    python benchmarks/narrow_layers.py

Chains of eight equal convolutions on 32x32 images, one thread, batch 1, float and integer called in turns; prints median
processor times. What ``qakd_plugin.deploy.diagnosis`` calls narrow rests on this.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

CHANNELS = (4, 8, 12, 16, 24, 32, 64, 128)
DEPTH, SIZE, WARM_UP = 8, 32, 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    for name, kernel, depthwise in (("3x3", 3, False), ("1x1", 1, False), ("3x3 depthwise", 3, True)):
        for channels in CHANNELS:
            float_ms, integer_ms = _measure(channels, kernel, depthwise, options.calls)
            times = f"float {float_ms:.3f} ms, integer {integer_ms:.3f} ms"
            print(f"{name}, {channels} channels: {times}: {float_ms / integer_ms:.2f}x")


def _measure(channels: int, kernel: int, depthwise: bool, calls: int) -> tuple[float, float]:
    sessions = [_session(_chain(channels, kernel, depthwise, quantized)) for quantized in (False, True)]
    image = np.random.default_rng(0).random((1, channels, SIZE, SIZE), dtype=np.float32)
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(WARM_UP + calls):
        for session, taken in zip(sessions, times, strict=True):
            start = time.process_time()
            session.run(None, {"input": image})
            if index >= WARM_UP:
                taken.append(time.process_time() - start)
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


def _chain(channels: int, kernel: int, depthwise: bool, quantized: bool) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, array: object) -> str:
        constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def quantize(x: str, name: str) -> str:
        codes, value = f"{name}.codes", f"{name}.value"
        nodes.append(helper.make_node("QuantizeLinear", [x, "step", "zero"], [codes]))
        nodes.append(helper.make_node("DequantizeLinear", [codes, "step", "zero"], [value]))
        return value

    if quantized:
        constant("step", np.float32(0.05))
        constant("zero", np.uint8(0))
    x = quantize("input", "input") if quantized else "input"
    for index in range(DEPTH):
        shape = (channels, 1 if depthwise else channels, kernel, kernel)
        codes = random.integers(-127, 128, shape).astype(np.int8)
        if quantized:
            numbers = [
                constant(f"{index}.codes", codes),
                constant(f"{index}.scale", np.full(channels, 0.004, np.float32)),
                constant(f"{index}.zero", np.zeros(channels, np.int8)),
            ]
            nodes.append(helper.make_node("DequantizeLinear", numbers, [f"{index}.weight"], axis=0))
        else:
            constant(f"{index}.weight", codes.astype(np.float32) * np.float32(0.004))
        inputs = [x, f"{index}.weight", constant(f"{index}.bias", np.zeros(channels, np.float32))]
        group = channels if depthwise else 1
        nodes.append(
            helper.make_node("Conv", inputs, [f"{index}.out"], kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, group=group)
        )
        if quantized:
            x = quantize(f"{index}.out", f"{index}.quantized")
        else:
            x = f"{index}.relu"
            nodes.append(helper.make_node("Relu", [f"{index}.out"], [x]))
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, channels, SIZE, SIZE])
    output = helper.make_tensor_value_info(x, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "chain", [image], [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
