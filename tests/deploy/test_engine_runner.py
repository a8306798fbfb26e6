"""Running engines: everything but the GPU itself, which is stood in for by arrays at real addresses."""

from __future__ import annotations

import ctypes
import inspect
import re
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qakd_plugin.deploy.engine.bindings import Runtime, cuda_driver
from qakd_plugin.deploy.engine.cuda import Buffer, CudaGraph, CudaPythonDevice, open_device
from qakd_plugin.deploy.engine.manifest import LoadedEngine
from qakd_plugin.deploy.engine.runner import EngineRunner, EngineSession, check_shape
from qakd_plugin.errors import EngineError, MissingPackageError
from qakd_plugin.runtimes.base import Input

SMALLEST, LARGEST = (1, 3), (8, 3)
no_gpu = pytest.mark.skipif(cuda_driver() is not None, reason="there is a GPU")


class HostDevice:
    """A device whose GPU memory is other host memory; ``queue`` lists what was asked for, in order."""

    stream = 42

    def __init__(self) -> None:
        self.queue: list[str] = []

    def buffer(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        device = np.zeros(shape, dtype)
        return Buffer(np.zeros(shape, dtype), device.ctypes.data, device)

    def upload(self, buffer: Buffer) -> None:
        self.queue.append("upload")
        buffer.owner[...] = buffer.host

    def download(self, buffer: Buffer) -> None:
        self.queue.append("download")
        buffer.host[...] = buffer.owner

    def mark(self) -> int:
        self.queue.append("mark")
        return len(self.queue)

    def elapsed_ms(self, start: int, end: int) -> float:
        return float(end - start)

    def synchronize(self) -> None:
        self.queue.append("synchronize")

    def close(self) -> None:
        self.queue.append("close")


class Affine:
    """Engine and context at once, as far as a session uses them: outputs 2 x + 1 and the sum of x."""

    num_io_tensors = 3

    def __init__(self, device: HostDevice, fails: bool = False) -> None:
        self.device, self.fails, self.addresses, self.shape = device, fails, dict[str, int](), (0, 3)

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y", "total")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return np.float32

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [SMALLEST, SMALLEST, LARGEST]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], 1) if name == "total" else self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.device.stream
        self.device.queue.append("execute")
        if self.fails:
            return False
        x = self._at("x")
        self._at("y")[...] = 2 * x + 1
        self._at("total")[...] = x.sum(axis=1, keepdims=True)
        return True

    def _at(self, name: str) -> np.ndarray[Any, Any]:
        shape = self.get_tensor_shape(name)
        numbers = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses[name])
        return np.ctypeslib.as_array(numbers).reshape(shape)


def make_session(fails: bool = False, driver: Any = None) -> tuple[EngineSession, HostDevice]:
    device = HostDevice()
    engine = Affine(device, fails)
    module = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype)
    loaded = LoadedEngine(engine, Runtime("tensorrt", module), ["out of luck"], {})
    return EngineSession(loaded, engine, device, driver), device


def images(batch: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(batch, 3)).astype(np.float32)


def test_the_first_output_is_what_the_engine_computes_for_each_batch_size() -> None:
    session, _ = make_session()
    for batch in (1, 8, 8, 3):
        x = images(batch, seed=batch)
        np.testing.assert_allclose(session.run({"x": x})["y"], 2 * x + 1, rtol=1e-6)


def test_an_output_is_not_overwritten_by_the_next_call() -> None:
    session, _ = make_session()
    first, second = images(4, seed=1), images(4, seed=2)
    output = session.run({"x": first})["y"]
    session.run({"x": second})
    np.testing.assert_allclose(output, 2 * first + 1, rtol=1e-6)


def test_buffers_are_made_and_warmed_up_once_for_a_shape() -> None:
    session, device = make_session()
    session.run({"0": images(2)})
    assert device.queue == ["execute", "synchronize", "upload", "execute", "download", "download", "synchronize"]
    device.queue.clear()
    session.run({"0": images(2)})
    assert device.queue == ["upload", "execute", "download", "download", "synchronize"]


def test_parts_are_timed_between_their_own_marks() -> None:
    session, device = make_session()
    session.run({"0": images(2)})
    device.queue.clear()
    times = session.time({"x": images(2)})
    assert device.queue == ["mark", "upload", "mark", "execute", "mark", "download", "download", "mark", "synchronize"]
    assert (times.upload_ms, times.compute_ms, times.download_ms) == (2.0, 2.0, 3.0)


def test_wider_floats_are_converted_and_other_numbers_refused() -> None:
    session, _ = make_session()
    x = images(2).astype(np.float64)
    np.testing.assert_allclose(session.run({"x": x})["y"], 2 * x + 1, rtol=1e-6)
    with pytest.raises(EngineError, match="input 'x' takes float32, got complex64"):
        session.run({"x": x.astype(np.complex64)})


@pytest.mark.parametrize("shape", [(0, 3), (9, 3), (4, 2), (4, 3, 1), (3,)])
def test_shapes_outside_the_profile_are_refused_and_the_session_goes_on(shape: tuple[int, ...]) -> None:
    session, _ = make_session()
    with pytest.raises(EngineError, match=r"input 'x' takes \[1 to 8, 3\], got"):
        session.run({"x": np.zeros(shape, np.float32)})
    session.run({"0": images(4)})


def test_the_whole_profile_is_taken() -> None:
    check_shape("x", SMALLEST, SMALLEST, LARGEST)
    check_shape("x", LARGEST, SMALLEST, LARGEST)


def test_a_failing_engine_says_what_the_library_said() -> None:
    session, _ = make_session(fails=True)
    with pytest.raises(EngineError, match="failed to run: out of luck"):
        session.run({"0": images(1)})


class GraphDriver:
    """The driver's graph functions: a captured function is kept and run at each launch."""

    def __init__(self, **statuses: int) -> None:
        self.statuses, self.called = statuses, list[str]()

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            self.called.append(name)
            status = self.statuses.get(name, 0)
            made = {"cuStreamEndCapture": 1, "cuGraphInstantiateWithFlags": 0}.get(name)
            if made is not None and not status:
                arguments[made]._obj.value = 1  # what ctypes.byref points at: the new handle
            return status

        return function


def test_a_captured_engine_is_launched_as_a_graph() -> None:
    driver = GraphDriver()
    session, device = make_session(driver=driver)
    session.run({"0": images(2)})
    assert session.captured
    assert device.queue.count("execute") == 2, "once to warm up, once while it is captured"
    assert driver.called == [
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
    ]
    session.run({"0": images(2)})
    assert driver.called[-1] == "cuGraphLaunch"
    assert device.queue.count("execute") == 2
    session.run({"0": images(3)})
    assert driver.called[-1] == "cuGraphLaunch"
    assert driver.called.count("cuGraphExecDestroy") == 1, "the graph of the former shape is freed"


@pytest.mark.parametrize("function", ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"])
def test_an_engine_that_cannot_be_captured_is_launched_call_by_call(function: str, caplog: pytest.LogCaptureFixture) -> None:
    session, _ = make_session(driver=GraphDriver(**{function: 900}))
    x = images(2)
    np.testing.assert_allclose(session.run({"x": x})["y"], 2 * x + 1, rtol=1e-6)
    assert not session.captured
    assert "launched one by one" in caplog.text
    assert "900" in caplog.text


def test_capture_ends_also_when_the_captured_function_fails() -> None:
    driver = GraphDriver()

    def fails() -> bool:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        CudaGraph(driver, 1, fails)  # type: ignore[arg-type]
    assert driver.called[-1] == "cuStreamEndCapture"
    with pytest.raises(EngineError, match="cannot be captured"):
        CudaGraph(driver, 1, lambda: False)  # type: ignore[arg-type]
    assert driver.called[-1] == "cuGraphDestroy"


class Masked(Affine):
    """Token ids and a mask in, their product and its sum out."""

    num_io_tensors = 4

    def __init__(self, device: HostDevice) -> None:
        super().__init__(device)
        self.shapes = dict[str, tuple[int, ...]]()

    def get_tensor_name(self, index: int) -> str:
        return ("ids", "mask", "y", "total")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in ("ids", "mask") else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return np.int32 if name in ("ids", "mask") else np.float32

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = self.shape = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.device.queue.append("execute")
        assert set(self.shapes.values()) == {self.shape}
        ids, mask = (self._integers(name) for name in ("ids", "mask"))
        self._at("y")[...] = ids * mask
        self._at("total")[...] = (ids * mask).sum(axis=1, keepdims=True)
        return True

    def _integers(self, name: str) -> np.ndarray[Any, Any]:
        numbers = (ctypes.c_int32 * int(np.prod(self.shape))).from_address(self.addresses[name])
        return np.ctypeslib.as_array(numbers).reshape(self.shape)


def test_engines_of_several_inputs_take_them_by_name_and_give_all_outputs() -> None:
    device = HostDevice()
    engine = Masked(device)
    module = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype)
    session = EngineSession(LoadedEngine(engine, Runtime("tensorrt", module), [], {}), engine, device)
    assert session.inputs["ids"] == Input((None, 3), np.dtype(np.int32))
    for batch in (2, 2, 5):
        ids, mask = np.arange(3 * batch).reshape(batch, 3), np.arange(3 * batch).reshape(batch, 3) % 2
        for inputs in ({"mask": mask, "ids": ids}, {"0": ids, "1": mask.astype(bool)}):
            found = session.run(inputs)
            assert list(found) == ["y", "total"]
            np.testing.assert_array_equal(found["y"], ids * mask)
            np.testing.assert_array_equal(found["total"][:, 0], (ids * mask).sum(1))
    with pytest.raises(EngineError, match="takes 'ids', 'mask', got 'ids'"):
        session.run({"ids": ids})
    with pytest.raises(EngineError, match="input 'mask' takes int32, got float32"):
        session.run({"ids": ids, "mask": mask.astype(np.float32)})
    with pytest.raises(EngineError, match=r"input 'ids' takes int32, got int64 with numbers that it cannot hold"):
        session.run({"ids": ids + 2**40, "mask": mask})


def test_the_time_to_load_an_engine_counts_neither_imports_nor_the_start_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def taking(seconds: float, result: Any) -> Callable[..., Any]:
        def step(*_: Any) -> Any:
            nonlocal now
            now += seconds
            return result

        return step

    device = HostDevice()
    engine = Affine(device)
    module = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype)
    library = Runtime("tensorrt", module)
    loaded = LoadedEngine(engine, library, [], {"float_type": "float32"})
    steps = {
        "read_manifest": taking(0.0, {"runtime": {"name": "tensorrt"}}),
        "load_runtime": taking(8.0, library),
        "open_device": taking(4.0, device),
        "load_engine": taking(0.002, loaded),
        "_make_context": taking(0.001, (engine, None)),
        "cuda_driver": taking(0.0, None),
        "time": SimpleNamespace(perf_counter=lambda: now),
    }
    for name, step in steps.items():
        monkeypatch.setattr(f"qakd_plugin.deploy.engine.runner.{name}", step)
    assert EngineRunner("net.engine").load_ms == pytest.approx(3.0)


def _failing(message: str) -> Callable[..., Any]:
    def step(*_: Any) -> Any:
        raise EngineError(message)

    return step


def _stand_in(monkeypatch: pytest.MonkeyPatch, cache: Any = None) -> HostDevice:
    """What a runner needs of TensorRT and of the machine, on the host."""
    device = HostDevice()
    engine = Affine(device)
    module = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in"), nptype=lambda dtype: dtype)
    library = Runtime("tensorrt_rtx", module)
    steps = {
        "read_manifest": {"runtime": {"name": "tensorrt_rtx"}},
        "load_runtime": library,
        "open_device": device,
        "load_engine": LoadedEngine(engine, library, [], {"float_type": "float32"}),
        "_make_context": (engine, cache),
    }
    for name, result in steps.items():
        monkeypatch.setattr(f"qakd_plugin.deploy.engine.runner.{name}", lambda *_, result=result: result)
    return device


@pytest.mark.parametrize("step", ["load_engine", "_make_context", "EngineSession"])
def test_nothing_is_held_of_an_engine_that_cannot_be_loaded(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = _stand_in(monkeypatch)
    monkeypatch.setattr(f"qakd_plugin.deploy.engine.runner.{step}", _failing("out of memory"))
    with pytest.raises(EngineError, match="out of memory"):
        EngineRunner("net.engine")
    assert device.queue == ["close"]


def test_the_gpu_is_let_go_of_where_the_runtime_cache_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    device = _stand_in(monkeypatch, SimpleNamespace(serialize=lambda: b"kernels"))
    runner = EngineRunner("net.engine", runtime_cache=tmp_path / "file" / "below.cache")
    with pytest.raises(EngineError, match=r"cannot write .*below\.cache"):
        runner.close()
    assert device.queue == ["close"]
    runner.close()
    assert device.queue == ["close"], "once"


def test_a_runner_writes_its_cache_and_lets_go_of_the_gpu_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = _stand_in(monkeypatch, SimpleNamespace(serialize=lambda: b"kernels"))
    with EngineRunner("net.engine", runtime_cache=tmp_path / "net.cache") as runner:
        x = images(2)
        np.testing.assert_allclose(runner.run(x), 2 * x + 1, rtol=1e-6)
    assert (tmp_path / "net.cache").read_bytes() == b"kernels"
    assert device.queue[-1] == "close"


class Status(IntEnum):
    CUDA_ERROR_LAUNCH_FAILED = 719


class HostDriver:
    """``cuda.bindings.driver`` on the host: ``held`` is what it made and was not given back.

    Args:
        fails: the function that does not work.
    """

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, fails: str = "") -> None:
        self.fails, self.held, self.now, self.made = fails, dict[int, Any](), 0.0, 0

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            return (Status.CUDA_ERROR_LAUNCH_FAILED,) if name == self.fails else (0, *self._do(name, arguments))

        return function

    def _do(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in {"cuMemAlloc", "cuMemHostAlloc"}:
            memory = np.zeros(arguments[0], np.int8)
            self.held[memory.ctypes.data] = memory
            return (memory.ctypes.data,)
        if name in {"cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"}:
            ctypes.memmove(*arguments[:3])
        elif name == "cuEventRecord":
            self.now += 1.5
            self.held[arguments[0]] = self.now
        elif name == "cuEventElapsedTime":
            return (self.held[arguments[1]] - self.held[arguments[0]],)
        elif name in {"cuMemFree", "cuMemFreeHost", "cuEventDestroy", "cuStreamDestroy"}:
            del self.held[arguments[0]]
        elif name in {"cuEventCreate", "cuStreamCreate"}:
            self.made += 1
            self.held[self.made] = name
            return (self.made,)
        elif name in {"cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"}:
            self.held.pop(-1, None) if name.endswith("Release") else self.held.setdefault(-1, "context")
        elif name in {"cuCtxPushCurrent", "cuCtxPopCurrent"}:
            self.held.pop(-2, None) if name.endswith("PopCurrent") else self.held.setdefault(-2, "current")
        return (0,) if name == "cuDeviceGet" else ("context",) if name.endswith(("Retain", "PopCurrent")) else ()


def test_cuda_python_carries_arrays_there_and_back_times_them_and_gives_everything_back() -> None:
    driver = HostDriver()
    device = CudaPythonDevice(driver)  # type: ignore[arg-type]
    there, empty = device.buffer((2, 3), np.float32), device.buffer((0, 3), np.int64)
    assert (empty.host.shape, empty.host.dtype) == ((0, 3), np.int64)
    there.host[...] = images(2)
    start = device.mark()
    device.upload(there)
    end = device.mark()
    there.host[...] = 0
    device.download(there)
    np.testing.assert_array_equal(there.host, images(2))
    assert device.elapsed_ms(start, end) == 1.5
    device.synchronize()
    del there, empty, start, end
    device.close()
    device.close()
    assert driver.held == {}


@pytest.mark.parametrize("function", ["cuInit", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuStreamCreate"])
def test_a_gpu_that_cannot_be_opened_is_not_held(function: str) -> None:
    driver = HostDriver(function)
    with pytest.raises(EngineError, match=f"{function} failed with CUDA error CUDA_ERROR_LAUNCH_FAILED"):
        CudaPythonDevice(driver)  # type: ignore[arg-type]
    assert driver.held == {}


def test_memory_that_does_not_suffice_is_not_held_in_half() -> None:
    driver = HostDriver("cuMemAlloc")
    device = CudaPythonDevice(driver)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="cuMemAlloc failed"):
        device.buffer((2, 3), np.float32)
    device.close()
    assert driver.held == {}


def test_a_failing_gpu_is_let_go_of_all_the_same() -> None:
    driver = HostDriver("cuStreamSynchronize")
    with pytest.raises(EngineError, match="cuStreamSynchronize failed"):
        CudaPythonDevice(driver).close()  # type: ignore[arg-type]
    assert driver.held == {}


def test_cuda_python_has_what_is_called() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    source = inspect.getsource(CudaPythonDevice)
    names = set(re.findall(r'"(cu[A-Z]\w+)"', source))
    assert len(names) > 15
    assert [name for name in sorted(names) if not hasattr(driver, name)] == []
    assert int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1


@pytest.mark.parametrize(
    ("absent", "outcome"),
    [
        (["cuda"], "pycuda.driver"),
        ([], "cuda.bindings.driver"),
        (["cuda", "pycuda"], "'.[cuda]'"),
    ],
)
def test_cuda_python_is_taken_where_it_is_installed_and_pycuda_otherwise(
    absent: list[str], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(module: str, *, extra: str, purpose: str) -> str:
        if module.partition(".")[0] in absent:
            raise MissingPackageError(f"{purpose}: pip install -e '.[{extra}]'")
        return module

    monkeypatch.setattr("qakd_plugin.deploy.engine.cuda.cuda_driver", lambda: object())
    monkeypatch.setattr("qakd_plugin.deploy.engine.cuda.require", require)
    monkeypatch.setattr("qakd_plugin.deploy.engine.cuda.CudaPythonDevice", lambda driver: driver)
    monkeypatch.setattr("qakd_plugin.deploy.engine.cuda.PycudaDevice", lambda driver: driver)
    finder = SimpleNamespace(find_spec=lambda name: None if name in absent else object())
    monkeypatch.setattr("qakd_plugin.deploy.engine.cuda.importlib", SimpleNamespace(util=finder))
    if outcome.startswith("'"):
        with pytest.raises(MissingPackageError, match=re.escape(outcome)):
            open_device()
    else:
        assert open_device() == outcome  # type: ignore[comparison-overlap]


@no_gpu
def test_without_a_gpu_the_runner_says_what_is_missing(tmp_path: Any) -> None:
    with pytest.raises(EngineError, match="needs an NVIDIA GPU and its driver"):
        open_device()
    with pytest.raises((EngineError, MissingPackageError), match=r"none\.engine\.json cannot be read"):
        EngineRunner(tmp_path / "none.engine")


@pytest.mark.parametrize(
    ("interface", "names"),
    [
        ("Runtime", ["deserialize_cuda_engine"]),
        (
            "ICudaEngine",
            ["num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_profile_shape"],
        ),
        ("ICudaEngine", ["create_runtime_config", "create_execution_context", "create_engine_inspector"]),
        ("IExecutionContext", ["set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"]),
        ("IRuntimeConfig", ["cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"]),
        ("IRuntimeConfig", ["create_runtime_cache", "set_runtime_cache"]),
        ("IRuntimeCache", ["serialize", "deserialize"]),
        ("CudaGraphStrategy", ["WHOLE_GRAPH_CAPTURE", "DISABLED"]),
        ("DynamicShapesKernelSpecializationStrategy", ["EAGER"]),
        ("EngineInspector", ["execution_context", "get_engine_information"]),
        ("LayerInformationFormat", ["JSON"]),
    ],
)
def test_what_the_runner_calls_is_in_the_installed_bindings(interface: str, names: list[str]) -> None:
    """They cannot be called without a GPU, but a name that is not there would be found only on one."""
    bindings = pytest.importorskip("tensorrt_rtx_bindings")
    assert [name for name in names if not hasattr(getattr(bindings, interface), name)] == []
