"""A file fitted to the processor that it will run on, by measuring there which layers are worth their integers.

Which layers are faster in integers depends on the processor, the runtime and the layer's neighbours: a depthwise convolution
between two shuffles may not be, and beside bfloat16 fewer are. What is tried: quantizers that no longer round, or on half their
step (:mod:`.grids`), and for ONNX Runtime weights with a zero point of -1 (:mod:`.zero_point`): its convolutions with symmetric
weights run on kernels that cannot use a matrix unit (AMX), and with codes lowered by one, which are the same numbers, it takes
its matrix product instead, which can. Whole files decide, in interleaved runs (:mod:`.search`), and what is faster is proven
against the file that it was made from (:mod:`.proof`). Such a file is for one runtime alone.
"""

from .tune import Tuning, tune_for_host
from .zero_point import eligible_layers, with_weight_zero_point

__all__ = ["Tuning", "eligible_layers", "tune_for_host", "with_weight_zero_point"]
