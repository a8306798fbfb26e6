"""What tuning makes finer moves no number by more than half a step, and is what the trained model computes without rounding."""

import json
from contextlib import ExitStack

import numpy as np
import onnx_ir as ir
import pytest
import torch
from qdq_graphs import UINT8, QdqGraph

from qakd_plugin import ExportError, ParityError, export_onnx, tune_for_host
from qakd_plugin.bench.candidates import Candidate
from qakd_plugin.bench.census import census
from qakd_plugin.bench.file_facts import record_of
from qakd_plugin.bench.jobs import jobs_of
from qakd_plugin.deploy.canonical.graph import activation_quantizers, read_onnx
from qakd_plugin.deploy.canonical.labels import calls_in, labels_of
from qakd_plugin.deploy.tuning import grids, search
from qakd_plugin.deploy.tuning.grids import Finer, grids_of, halvable, made_finer
from qakd_plugin.deploy.tuning.search import Choice, Search
from qakd_plugin.deploy.tuning.timing import Variants
from qakd_plugin.toolkits import adapter_for

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module", params=RUNTIMES)
def exported(request, tmp_path_factory, make_student, digits):
    """A student, its file for a runtime, and the images that it was proven on."""
    student, images = make_student("modelopt", 8), digits.test[0][:16]
    path = tmp_path_factory.mktemp("exported") / "s.onnx"
    export_onnx(student, images, path, target=request.param)
    return student.eval(), path, request.param, images


def _search(path, runtime, batches, **options):
    defaults = {"calls": 5, "minimum_gain": 0.02, "exact": False}
    return Search(read_onnx(path), Variants(path, runtime, 1), batches, **defaults | options)


def _quantizers(model, indices):
    """Names, in the trained model, of all quantizers of some grids."""
    nodes = [node for index in indices for node in grids_of(model)[index].quantizers]
    return {call.quantizer for node in nodes for call in calls_in(labels_of(node))}


def _trained(student, images, replaced):
    """What the prepared model outputs where quantizers output what ``replaced`` makes of their input and of their grid."""
    form = adapter_for(student).export_form(student)
    with ExitStack() as stack, torch.no_grad():
        for name, other in replaced.items():
            grid = form.get_submodule(name)
            hook = lambda module, args, output, other=other, grid=grid: other(args[0], grid)  # noqa: E731
            stack.callback(student.get_submodule(grid.source).register_forward_hook(hook).remove)
        return student(images).numpy()


def _clamped(x, grid):
    return x.clamp((grid.quant_min - grid.zero_point) * grid.scale, (grid.quant_max - grid.zero_point) * grid.scale)


def _on_half_step(x, grid):
    return torch.clamp(torch.round(x / (grid.scale / 2)), 0, 255) * (grid.scale / 2)


def _computed(path, runtime, images, finer):
    model = made_finer(read_onnx(path), finer, runtime)
    variants = Variants(path, runtime, 1)
    return variants.as_it_says(variants.serialized(model), [{"input": images.numpy()}])[0][0]


def _noise(one, other):
    return float(((one.astype(np.float64) - other) ** 2).sum())


def test_without_rounding_a_file_is_the_prepared_model_with_quantizers_that_only_clamp(exported):
    student, path, runtime, images = exported
    model = read_onnx(path)
    everything = range(len(grids_of(model)))
    names = _quantizers(model, everything)
    found = _computed(path, runtime, images, Finer(unrounded=frozenset(everything)))
    expected, plain = _trained(student, images, dict.fromkeys(names, _clamped)), _trained(student, images, {})
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)
    assert np.abs(found - plain).max() > 1e-3 * np.ptp(expected)


def test_some_quantizers_can_be_left_out_alone(exported):
    student, path, runtime, images = exported
    model = read_onnx(path)
    some = range(0, len(grids_of(model)), 2)
    found = _computed(path, runtime, images, Finer(unrounded=frozenset(some)))
    expected = _trained(student, images, dict.fromkeys(_quantizers(model, some), _clamped))
    plain = _trained(student, images, {})
    assert _noise(found, expected) < 0.1 * _noise(plain, expected)  # of quantizers that are left, ties may fall otherwise


def test_half_steps_are_the_prepared_model_with_codes_up_to_255(exported):
    student, path, runtime, images = exported
    model = read_onnx(path)
    halves = halvable(model, runtime)
    assert halves
    found = _computed(path, runtime, images, Finer(halved=halves))
    expected = _trained(student, images, dict.fromkeys(_quantizers(model, halves), _on_half_step))
    plain = _trained(student, images, {})
    assert _noise(found, expected) < 0.1 * _noise(plain, expected)
    kept = [node for node in made_finer(model, Finer(halved=halves), runtime).graph if node.op_type == "Clip"]
    assert len(kept) < sum(node.op_type == "Clip" for node in model.graph)


def test_layers_whose_quantizers_are_left_out_compute_in_floating_point(exported, tmp_path):
    _, path, runtime, _ = exported
    if runtime != "onnxruntime":
        pytest.skip("the census is ONNX Runtime's")
    model = read_onnx(path)
    first = grids_of(model)[0]
    ir.save(made_finer(model, Finer(unrounded=frozenset({0})), runtime), tmp_path / "s.onnx")
    floats = set(census(tmp_path / "s.onnx").float_layers) - set(census(path).float_layers)
    assert {name.partition(":")[0] for name in floats} == {node.name for node in first.readers}


def test_what_is_proven_holds_and_a_lost_clamp_does_not(exported, monkeypatch):
    _, path, runtime, images = exported
    whole = _search(path, runtime, [{"input": images.numpy()}])
    changes = Choice(Finer(frozenset({1, 2}), halvable(whole.model, runtime)))
    proof = whole.prove(changes)
    assert proof.quantizers > 2
    assert 0.4 < proof.largest_step < 0.501
    assert not proof.same_bits
    monkeypatch.setattr(grids, "_is_within", lambda *_: True)
    monkeypatch.setattr(grids, "_set_bounds", lambda graph, clip, low, high: clip.resize_inputs(1))
    with pytest.raises(ParityError, match=r"moves its numbers by .* steps"):
        whole.prove(Choice(Finer(frozenset(range(len(whole.grids))))))


def test_a_runtime_that_computes_something_else_is_told(exported, monkeypatch):
    _, path, runtime, images = exported
    whole = _search(path, runtime, [{"input": images.numpy()}])
    right = Variants.deployed
    monkeypatch.setattr(Variants, "deployed", lambda *args: [[1.2 * one for one in outputs] for outputs in right(*args)])
    with pytest.raises(ParityError, match=f"{runtime} computes something else than the tuned file says"):
        whole.prove(Choice(Finer(frozenset({0}))))


@pytest.mark.parametrize(("gain", "kept"), [(0.015, False), (0.025, True)])
def test_a_change_is_kept_from_two_percent_on(gain, kept, exported, tmp_path, monkeypatch):
    """One of the quantizers costs as much as it says; nothing else costs anything."""
    path = exported[1]

    def times(self, choices, calls):
        return [1 - gain * (3 in choice.finer.unrounded) for choice in choices]

    monkeypatch.setattr(Search, "_times", times)
    monkeypatch.setattr(Variants, "layer_times", lambda self, variant, inputs: {"between layers": 1.0})
    tuning = tune_for_host(path, tmp_path / "t.onnx")
    assert (tuning.proof is not None) == (tmp_path / "t.onnx").exists() == kept
    assert json.loads((tmp_path / "t.tuning.json").read_text())["unrounded"] == list(tuning.unrounded)
    if not kept:
        assert tuning.path == path
        assert tuning.unrounded == ()
        return
    name = grids_of(read_onnx(path))[3].name
    assert name in tuning.unrounded
    record = record_of(tmp_path / "t.onnx")
    assert name in record.tuning["unrounded"]
    assert record.tuning["float_layers"] == list(tuning.float_layers)
    assert record.tuning["proof"]["largest_step"] <= 0.501
    assert record.parity["activation_codes"] > 0
    left = {labels_of(node) for node in activation_quantizers(read_onnx(tmp_path / "t.onnx").graph)}
    assert name not in left


def test_layers_that_cost_more_in_floating_point_are_not_tried(exported, monkeypatch):
    _, path, runtime, images = exported
    whole = _search(path, runtime, [{"input": images.numpy()}])
    plain = len(whole.runtime.serialized(whole.model))
    layers = [node.name for node in whole.model.graph if node.op_type in grids.LAYERS]

    def times(self, variant, inputs):
        return dict.fromkeys(layers, 1.0 if len(variant.data) <= plain else 4.0) | {"between layers": 0.5}

    monkeypatch.setattr(Variants, "layer_times", times)
    for choice in whole._proposals(Choice()):
        assert not grids.floats_of([grids_of(whole.model)[index] for index in choice.finer.unrounded], runtime)


def test_a_file_is_tuned_and_says_so(exported, tmp_path, monkeypatch):
    _, path, runtime, images = exported
    monkeypatch.setattr(search, "ROUNDS", 1)
    out = tmp_path / "t.onnx"
    tuning = tune_for_host(path, out, samples=images.numpy(), calls=2, minimum_gain=-100.0)
    assert (tuning.path, tuning.runtime) == (out, runtime)
    assert f"{tuning.plain_ms:.2f} ms plain" in str(tuning)
    assert record_of(out).tuning["runtime"] == runtime
    (job,) = jobs_of([Candidate(out, weight_bits=8, activation_bits=8)], [runtime], [1])
    assert job.precision == tuning.precision


def _relus(tmp_path):
    """A convolution whose ReLU is the lower end of its quantizer's range, as ONNX Runtime's form has it."""
    graph = QdqGraph(("batch", 8, 8, 8))
    x = graph.quantize("input", "in", dtype=UINT8, zero_point=128)
    x = graph.quantize(graph.conv(x, "conv", (8, 8)), "out", scale=0.002, dtype=UINT8)
    return graph.save(tmp_path / "s.onnx", graph.add("GlobalAveragePool", [x], "pool"), rank=4)


def test_a_relu_that_a_quantizer_has_absorbed_stays(tmp_path):
    path, draw = _relus(tmp_path), np.random.default_rng(0)
    model = made_finer(read_onnx(path), Finer(frozenset({1})), "onnxruntime")
    model.graph.outputs[0] = next(node for node in model.graph if node.op_type == "GlobalAveragePool").inputs[0]
    variants = Variants(path, "onnxruntime", 1)
    batch = {"input": draw.normal(size=(4, 8, 8, 8)).astype(np.float32)}
    (output,) = variants.as_it_says(variants.serialized(model), [batch])[0]
    assert output.min() == 0
    assert output.max() == np.float32(255) * np.float32(0.002)


def test_codes_that_something_else_reads_are_left_alone(tmp_path):
    graph = QdqGraph(("batch", 8, 8, 8))
    x = graph.conv(graph.quantize("input", "in", dtype=UINT8), "conv", (8, 8))
    path = graph.save(tmp_path / "s.onnx", graph.quantize(x, "out", dtype=UINT8), rank=4)
    model = read_onnx(path)
    codes = next(node for node in model.graph if node.name == "out/QuantizeLinear").outputs[0]
    codes.dtype, codes.shape = ir.DataType.UINT8, ir.Shape(["n", 8, 8, 8])
    model.graph.outputs.append(codes)
    assert [grid.name for grid in grids_of(model)] == ["in/QuantizeLinear"]


def test_a_file_without_quantized_activations_is_named(tmp_path):
    graph = QdqGraph(("batch", 8, 8, 8))
    path = graph.save(tmp_path / "s.onnx", graph.conv("input", "conv", (8, 8)), rank=4)
    with pytest.raises(ExportError, match=r"s\.onnx holds no quantized activation: there is nothing to tune"):
        tune_for_host(path, tmp_path / "t.onnx")
