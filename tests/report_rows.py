"""Rows for tests of comparison and reports: made up, since what is tested is what is done with them."""

from qakd_plugin.bench.rows import Conditions, LayerTime, Row
from qakd_plugin.deploy.diagnosis import Finding

ROW = Row(
    "digits", "SQAKD", "modelopt", 8, 8, "onnxruntime", "int8", 1, 1, 100, 1.0, 1.2, None, 1.0, 1000.0, 5.0, 0.1, 0.97, 0.95,
    0.98, 450,
)  # fmt: skip
CONDITIONS = Conditions(0.5, 1.0, 0.1, 2600, None, False)
LAYERS = (LayerTime("stem/Conv", "QLinearConv", "uint8", 0.75), LayerTime("head/Gemm", "Gemm", "float32", 0.25))
FINDING = Finding("output not quantized", ("stages.0.conv2",), "Quantize what the addition reads.")
