"""Nothing of the machine that a file was made on stays in it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, common

from .graph import DOMAIN, QUANTIZER_KEY, WEIGHT_KEY

_OURS = {QUANTIZER_KEY, WEIGHT_KEY}


class Clean(InPlacePass):
    """Remove what the exporter leaves in a model: local paths, stack traces, unused values."""

    def call(self, model: ir.Model) -> PassResult:
        ours = {
            node: {key: node.metadata_props[key] for key in (QUANTIZER_KEY, WEIGHT_KEY) if key in node.metadata_props}
            for node in model.graph
        }
        common.ClearMetadataAndDocStringPass()(model)
        model.graph.metadata_props.clear()
        model.metadata_props.clear()
        for node, metadata in ours.items():
            node.metadata_props.update(metadata)
        for value in model.graph.initializers.values():
            value.metadata_props.clear()
        common.RemoveUnusedNodesPass()(model)
        model.functions.clear()
        model.opset_imports.pop(DOMAIN, None)
        model.producer_name, model.producer_version = "qakd_plugin", ""
        model.graph.name = "student"
        return PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.metadata_props.keys() - _OURS or node.doc_string:
                raise PostconditionError(f"{node.name}: the exporter's notes are still in the model")
