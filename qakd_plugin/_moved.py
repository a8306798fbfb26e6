"""Import paths of 0.1 that lead to where their modules are now, with one DeprecationWarning each. Gone in 0.4.

An old path becomes a module whose names are those of the new ones. Where an old module has become a package of the same name
(``deploy.engine``), the package forwards the names that it had: see :func:`forwarded`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]

# Old module: the modules that hold its names now.
MOVED: dict[str, tuple[str, ...]] = {
    "_files": ("_common.files",),
    "_optional": ("_common.optional",),
    "attention": ("placement.attention",),
    "augment.images": ("augment.data",),
    "augment.select": ("augment.selector",),
    "augment.show": ("augment.presentation",),
    "averaging": ("training.ema",),
    "backends": ("toolkits",),
    "backends.base": ("toolkits.adapter",),
    "backends.fake_quantize": ("toolkits.fake_quantizers",),
    "backends.learned": ("toolkits.fake_quantizers",),
    "backends.modelopt": ("toolkits.modelopt.adapter", "toolkits.modelopt.registration"),
    "backends.modelopt_quantizer": ("toolkits.modelopt.quantizer",),
    "backends.pt2e": ("toolkits.pt2e.adapter",),
    "backends.pt2e_quantizer": ("toolkits.pt2e.quantizer",),
    "backends.torch_ao": ("toolkits.torch_ao.fx",),
    "backends.torch_ao_eager": ("toolkits.torch_ao.eager",),
    "backends.torchao": ("toolkits.torchao_qat",),
    "batches": ("tasks.batches",),
    "bench.comparison": ("bench.ratios",),
    "bench.contents": ("bench.file_facts",),
    "bench.environment": ("runtimes.host",),
    "bench.record": ("bench.rows", "bench.schema"),
    "bench.runners": ("bench.loading", "runtimes.base", "runtimes.onnxruntime", "runtimes.openvino"),
    "bench.scoring": ("bench.accuracy",),
    "bench.torch_runner": ("runtimes.pytorch",),
    "bench.turns": ("runtimes.interleaving",),
    "calibration": ("placement.calibration",),
    "checkpoint": ("training.checkpoint",),
    "checks": ("training.preflight", "training.divergence"),
    "cpu": ("_common.cpu_features",),
    "demo.run": ("demo.pipeline",),
    "deploy.cuda": ("deploy.engine.cuda",),
    "deploy.engine_file": ("deploy.engine.manifest",),
    "deploy.engine_runner": ("deploy.engine.runner",),
    "deploy.export_form": ("export_form.modules",),
    "deploy.exportable": ("preparation.feasibility",),
    "deploy.float16": ("deploy.targets.float16", "deploy.parity.float16"),
    "deploy.graph": ("deploy.canonical.graph",),
    "deploy.inspect_onnx": ("deploy.engine.precheck",),
    "deploy.inspector": ("deploy.engine.layer_inspector",),
    "deploy.openvino_form": ("deploy.targets.openvino",),
    "deploy.openvino_parity": ("deploy.parity.openvino",),
    "deploy.ops": ("export_form.ops",),
    "deploy.ort_form": (
        "deploy.targets.onnxruntime",
        "deploy.targets.onnxruntime_bias",
        "deploy.canonical.clamps",
        "deploy.canonical.quantizers",
        "deploy.canonical.sign_analysis",
    ),
    "deploy.passes": (
        "deploy.canonical.write",
        "deploy.canonical.lowering",
        "deploy.canonical.batch_norm",
        "deploy.canonical.clamps",
        "deploy.canonical.quantizers",
        "deploy.canonical.int4",
        "deploy.canonical.opset",
        "deploy.canonical.cleanup",
        "deploy.targets.tensorrt",
    ),
    "deploy.plan": ("deploy.engine.rtx_plan",),
    "deploy.session": ("runtimes.onnxruntime",),
    "deploy.storage": ("deploy.targets.weight_packing",),
    "deploy.to_onnx": ("deploy.export", "deploy.canonical.write", "export_form.tracing"),
    "deploy.trt": ("deploy.engine.bindings",),
    "deploy.tune": ("deploy.tuning", "deploy.tuning.zero_point"),
    "description": ("preparation.description",),
    "distillation": ("training.distillation",),
    "evaluation": ("tasks.evaluation",),
    "features": ("training.features",),
    "hooks": ("training.attached", "training.teachers"),
    "loop": ("training.trainer", "training.run_state"),
    "methods": ("training.methods",),
    "modes": ("_common.module_mode",),
    "optim": ("training.optimizers", "training.config"),
    "outputs": ("tasks.outputs",),
    "precision": ("training.autocast",),
    "processes": ("training.distributed.processes", "training.distributed.launch", "training.distributed.observers"),
    "progress": ("_common.console",),
    "qparams": ("quantizers.qparams",),
    "quantizers.form": ("quantizers.fake_quantize",),
    "quantizers.rule": ("quantizers.base",),
    "randomness": ("_common.rng_state",),
    "report.plot": ("report.scatter",),
    "report.words": ("report.verdicts",),
    "sharding": ("training.distributed.shards",),
    "swap": ("preparation.exchange",),
    "targets": ("placement.targets",),
    "teacher_cache": ("training.teacher_cache",),
    "teachers": ("training.teachers",),
    "tracking": ("training.tracking",),
}


def forwarded(package: str, *modules: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package that was a module until 0.1: its names are found in ``modules`` below it."""

    def __getattr__(name: str) -> Any:
        if not name.startswith("__"):
            for module in modules:
                home = importlib.import_module(f"{package}.{module}")
                if hasattr(home, name):
                    _warn(f"{package}.{name}", f"{home.__name__}.{name}", stacklevel=2)
                    value = getattr(home, name)
                    setattr(sys.modules[package], name, value)  # the warning comes once
                    return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def install() -> None:
    """Let old paths be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{old} has moved to {new}; the old path goes in 0.4", DeprecationWarning, stacklevel=stacklevel + 1)


class _Alias(ModuleType):
    """A module that holds what other modules hold."""

    def __init__(self, name: str, homes: Sequence[ModuleType]) -> None:
        super().__init__(name, f"Moved to {' and '.join(home.__name__ for home in homes)}.")
        self.__dict__["_homes"] = tuple(homes)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for home in self.__dict__["_homes"]:
                if hasattr(home, name):
                    return getattr(home, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _AliasLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        old = spec.name.removeprefix(f"{_PACKAGE}.")
        homes = [importlib.import_module(f"{_PACKAGE}.{new}") for new in MOVED[old]]
        return _Alias(spec.name, homes)

    def exec_module(self, module: ModuleType) -> None:
        pass  # its names are looked up when they are asked for


class _Finder(MetaPathFinder):
    """Asked last, so that it answers for modules that are not there any more only."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{_PACKAGE}.")
        if old == fullname or old not in MOVED:
            return None
        new = " and ".join(f"{_PACKAGE}.{name}" for name in MOVED[old])
        _warn(fullname, new, stacklevel=2)
        return ModuleSpec(fullname, _AliasLoader(), is_package=any(name.startswith(f"{old}.") for name in MOVED))
