"""Quantization-aware knowledge distillation for models that a toolkit has already prepared.

    result = qakd_plugin.distill(prepared_model, teacher, loader)
    file = qakd_plugin.export_onnx(result.model, images, "student.onnx")
    engine = qakd_plugin.build_engine(file, "student.engine")

Names are imported when they are first used, so that deploying on a machine without torch stays possible. No submodule has the
name of a public function: importing it would put the module in the function's place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved
from ._common.lazy import lazy

__version__ = "0.1.0"

_moved.install()

_HOME = {
    "distill": "training.distillation",
    "DistillResult": "training.distillation",
    "attach": "training.attached",
    "save": "training.student_file",
    "load": "training.student_file",
    "sensitivity": "training.sensitivity",
    "Sensitivity": "training.sensitivity",
    "prepare": "preparation.prepared",
    "configuration": "preparation.prepared",
    "use_quantizers": "preparation.exchange",
    "restore_quantizers": "preparation.exchange",
    "LSQ": "quantizers",
    "PACT": "quantizers",
    "DoReFa": "quantizers",
    "EWGS": "quantizers",
    "describe": "preparation.description",
    "SQAKD": "training.methods",
    "QKD": "training.methods",
    "KD": "training.methods",
    "QAT": "training.methods",
    "Features": "training.features",
    "cmi_score": "augment.cmi",
    "rank_augmentations": "augment.ranking",
    "CMISelector": "augment.selector",
    "export_onnx": "deploy.export",
    "ExportedModel": "deploy.export",
    "tune_for_host": "deploy.tuning",
    "build_engine": "deploy.engine.build",
    "benchmark": "bench",
    "write_report": "report",
    "export_float": "deploy.export",
    "diagnose": "deploy.diagnosis",
    "evaluate": "tasks.evaluation",
    "Settings": "training.config",
    "EngineRunner": "deploy.engine.runner",
    "restore_modelopt": "toolkits.modelopt",
    "default_batch": "tasks.batches",
    "refresh_delta": "quantizers",
    "Candidate": "bench",
    "console_table": "report",
    "KL": "tasks.matchers",
    "BinaryKL": "tasks.matchers",
    "L2": "tasks.matchers",
    "L1": "tasks.matchers",
    "SmoothL1": "tasks.matchers",
    "Cosine": "tasks.matchers",
    "outputs_of": "tasks.output_table",
    "ArgumentError": "errors",
    "QakdError": "errors",
    "NotPreparedError": "errors",
    "UnsupportedQuantizerError": "errors",
    "LabelsRequiredError": "errors",
    "TrainingError": "errors",
    "ExportError": "errors",
    "ParityError": "errors",
    "EngineError": "errors",
    "CheckpointError": "errors",
    "MissingPackageError": "errors",
}
_MODULES = ("losses",)

__all__ = ["__version__", *_MODULES, *_HOME]

if TYPE_CHECKING:
    from . import losses as losses
    from .augment.cmi import cmi_score as cmi_score
    from .augment.ranking import rank_augmentations as rank_augmentations
    from .augment.selector import CMISelector as CMISelector
    from .bench import Candidate as Candidate
    from .bench import benchmark as benchmark
    from .deploy.diagnosis import diagnose as diagnose
    from .deploy.engine.build import build_engine as build_engine
    from .deploy.engine.runner import EngineRunner as EngineRunner
    from .deploy.export import ExportedModel as ExportedModel
    from .deploy.export import export_float as export_float
    from .deploy.export import export_onnx as export_onnx
    from .deploy.tuning import tune_for_host as tune_for_host
    from .errors import ArgumentError as ArgumentError
    from .errors import CheckpointError as CheckpointError
    from .errors import EngineError as EngineError
    from .errors import ExportError as ExportError
    from .errors import LabelsRequiredError as LabelsRequiredError
    from .errors import MissingPackageError as MissingPackageError
    from .errors import NotPreparedError as NotPreparedError
    from .errors import ParityError as ParityError
    from .errors import QakdError as QakdError
    from .errors import TrainingError as TrainingError
    from .errors import UnsupportedQuantizerError as UnsupportedQuantizerError
    from .preparation.description import describe as describe
    from .preparation.exchange import restore_quantizers as restore_quantizers
    from .preparation.exchange import use_quantizers as use_quantizers
    from .preparation.prepared import configuration as configuration
    from .preparation.prepared import prepare as prepare
    from .quantizers import EWGS as EWGS
    from .quantizers import LSQ as LSQ
    from .quantizers import PACT as PACT
    from .quantizers import DoReFa as DoReFa
    from .quantizers import refresh_delta as refresh_delta
    from .report import console_table as console_table
    from .report import write_report as write_report
    from .tasks.batches import default_batch as default_batch
    from .tasks.evaluation import evaluate as evaluate
    from .tasks.matchers import KL as KL
    from .tasks.matchers import L1 as L1
    from .tasks.matchers import L2 as L2
    from .tasks.matchers import BinaryKL as BinaryKL
    from .tasks.matchers import Cosine as Cosine
    from .tasks.matchers import SmoothL1 as SmoothL1
    from .tasks.output_table import outputs_of as outputs_of
    from .toolkits.modelopt import restore_modelopt as restore_modelopt
    from .training.attached import attach as attach
    from .training.config import Settings as Settings
    from .training.distillation import DistillResult as DistillResult
    from .training.distillation import distill as distill
    from .training.features import Features as Features
    from .training.methods import KD as KD
    from .training.methods import QAT as QAT
    from .training.methods import QKD as QKD
    from .training.methods import SQAKD as SQAKD
    from .training.sensitivity import Sensitivity as Sensitivity
    from .training.sensitivity import sensitivity as sensitivity
    from .training.student_file import load as load
    from .training.student_file import save as save


_find = lazy(__name__, _HOME)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__) if name in _MODULES else _find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
