"""Beside other tools on real images: every tool gets its rates, what fails is told, and figures are compared by seed."""

import importlib
import sys

import peers
import peers_fashion
import pytest
import torch
from peers_fashion import RATES, TINY, Cell


def test_a_student_of_two_bits_is_trained_in_the_studys_setting(garments, tmp_path):
    setting = peers_fashion.Garments(TINY, tmp_path, garments)
    cell = Cell("ours_modelopt", 2, peers_fashion.RATES_SEED, RATES[2][0])
    peers_fashion.train(setting, tmp_path, [cell], until=float("inf"))
    found = peers_fashion.read(tmp_path, cell)
    assert 0 <= found["held_out"] <= 1
    assert "deployed" not in found, "students that choose rates are not exported"
    (row,) = (row for row in peers_fashion.read_rates(tmp_path))
    assert row == {"peer": "ours_modelopt", "bits": 2, "lr": cell.lr, "held_out": found["held_out"]}


def test_no_student_is_begun_when_time_is_up(garments, tmp_path):
    setting = peers_fashion.Garments(TINY, tmp_path, garments)
    cell = Cell("ours_modelopt", 2, 0, 1e-3)
    peers_fashion.train(setting, tmp_path, [cell], until=0.0)
    assert peers_fashion.read(tmp_path, cell) is None
    failing = [sys.executable, "-c", "raise SystemExit(1)"]
    peers_fashion.train_missing(failing, tmp_path, {("ours_modelopt", 0): [cell]}, processes=1, until=0.0)


def test_few_bits_in_nncf_are_refused_in_its_own_words(garments, tmp_path):
    pytest.importorskip("nncf")
    setting = peers_fashion.Garments(TINY, tmp_path, garments)
    peer = next(peer for peer in peers.PEERS if peer.name == "nncf_qat")
    assert "incompatible" in peers.run(peer, 4, setting, 0, tmp_path / "files", deploy=False)["error"]


def test_few_bits_in_torch_ao_are_codes_of_few_bits_between_the_first_layer_and_the_last(garments, tmp_path):
    code = importlib.import_module("peer_code.torch_ao_kd_loop")
    mapping, defaults = code.configuration(2), code.configuration(8).global_qconfig
    assert [mapping.module_name_qconfigs[layer].weight().quant_max for layer in ("stem", "head")] == [127, 127]
    assert defaults.weight().quant_max == 127
    codes = [
        (made.quant_min, made.quant_max) for made in (mapping.global_qconfig.weight(), mapping.global_qconfig.activation())
    ]
    assert codes == [(-2, 1), (0, 3)]
    setting = peers_fashion.Garments(TINY, tmp_path, garments)
    peer = next(peer for peer in peers.PEERS if peer.name == "torch_ao_kd_loop")
    assert 0 <= peers.run(peer, 4, setting, 0, tmp_path / "files", deploy=False)["accuracy"] <= 1


def test_the_order_of_images_is_the_seeds(garments, tmp_path):
    setting = peers_fashion.Garments(TINY, tmp_path, garments)
    first, again, other = (next(iter(setting.loader(setting.train, seed)))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_tool_has_students_where_all_its_rates_were_tried():
    rates = [{"peer": "a", "bits": 8, "lr": lr, "held_out": share} for lr, share in zip(RATES[8], (0.5, 0.7, 0.6), strict=True)]
    rates += [{"peer": "a", "bits": 4, "lr": RATES[4][0], "held_out": 0.9}]
    rates += [{"peer": "b", "bits": 8, "lr": lr, "error": "no"} for lr in RATES[8]]
    assert peers_fashion.chosen(rates) == {("a", 8): RATES[8][1]}
    peer = peers.Peer("a", "A", "torch", ())
    made = peers_fashion.cells(TINY, peer, peers_fashion.chosen(rates))
    assert made == [Cell("a", 8, peers_fashion.FIRST_SEED, RATES[8][1])]
    assert len({cell.slug for cell in made + peers_fashion.rate_cells(peer)}) == len(made) + sum(map(len, RATES.values()))


def test_the_table_compares_seeds_that_both_have_and_tells_failures():
    def runs(**accuracies):
        deployed = {"onnxruntime": {"accuracy": 0.8}, "openvino": {"error": "RuntimeError: no `op`"}}
        return {seed[1:]: {"accuracy": share, "cpu_seconds": 10.0, "deployed": deployed} for seed, share in accuracies.items()}

    students = [
        {"peer": "ours_modelopt", "label": "ours", "bits": 8, "lr": 1e-4, "cells": runs(s1=0.9, s2=0.8)},
        {"peer": "nncf_qat", "label": "NNCF", "bits": 8, "lr": 1e-3, "cells": runs(s2=0.7, s3=0.9)},
        {"peer": "nncf_qat", "label": "NNCF", "bits": 4, "lr": None, "cells": {"0": {"error": "ValueError: 4"}}},
    ]
    document = {"teacher": 0.95, "students": students, "rates": []}
    assert peers_fashion.over(document) == {("nncf_qat", 8): [pytest.approx(0.1)]}
    table = peers_fashion.make_table(document).splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[:6]]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[2][3] == "95.00"
    assert lines[4][:7] == ["NNCF, W8A8", "0.001", "2", "80.00 ± 127.06", "+10.00", "-", "-"]
    assert lines[4][7:] == ["80.00", "fails (2)", "10.0"]
    assert lines[5][3] == "fails (3)"
    assert table[-1] == "(3) `ValueError: 4`"
