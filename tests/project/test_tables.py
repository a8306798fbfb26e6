"""Every table of figures in docs/ is what its script makes of the committed JSON."""

import json
from importlib import import_module

import evidence_figure
import evidence_page
import numpy as np
import page_tables
import pytest
from evidence_drawing import places_of

TABLES = [
    "step_time",
    "weight_only",
    "distill_step",
    "engines",
    "peers",
    "augmentation_cost",
    "augmentation_racing",
]


def path_of(name):
    return page_tables.RESULTS / f"{name}.json"


def committed(name):
    return json.loads(path_of(name).read_text())


def of_each_processor(names):
    """Names of committed files, and how they and their tables end."""
    return [(name, ending) for name in names for ending in ("", page_tables.AMX) if path_of(name + ending).is_file()]


@pytest.mark.parametrize(("name", "ending"), of_each_processor(TABLES))
def test_a_table_of_what_was_measured_is_made_from_the_committed_figures(name, ending):
    assert page_tables.read_table(name + ending) == import_module(name).make_table(committed(name + ending))


@pytest.mark.parametrize(("name", "ending"), of_each_processor(["deployment"]))
def test_all_tables_of_deployment_are_made_from_the_committed_figures(name, ending):
    for table, text in import_module(name).make_tables(committed(name + ending)).items():
        assert page_tables.read_table(table + ending) == text, table


def test_files_of_a_processor_with_amx_hold_figures_of_such_a_one():
    found = list(page_tables.RESULTS.glob(f"*{page_tables.AMX}.json"))
    assert found
    for path in found:
        document = json.loads(path.read_text())
        for cell in document.get("networks", {"": document}).values():
            assert "amx_int8" in cell["environment"]["cpu_flags"], path


def test_the_page_of_the_evidence_and_its_figure_are_made_from_the_committed_figures():
    document = committed("evidence")
    page = evidence_page.DOCS / evidence_page.PAGE
    for name, table in evidence_page.page_tables_of(evidence_page.committed()).items():
        assert page_tables.read_table(name, page) == table, name
    shown = places_of(page.with_name(evidence_page.FIGURE).read_text())
    again = places_of(evidence_figure.draw(document))
    assert len(shown) == 4 * (2 + 2 * 2 + 1 + 4)
    assert shown.keys() == again.keys()
    for name, places in shown.items():
        np.testing.assert_allclose(places, again[name], atol=0.01, err_msg=name)


def test_the_tables_of_studies_on_real_data_are_made_from_the_committed_figures():
    encoder, fashion_study, qkd_study = import_module("minilm_study"), evidence_page.fashion_study, import_module("qkd_study")
    detection, peers = import_module("detection_study"), import_module("peers_fashion")
    made = {
        "efficientnet_study": import_module("efficientnet_study").make_table(committed("efficientnet_study")),
        "minilm_study": encoder.make_table(committed("minilm_study")),
        "minilm_latency": encoder.make_latency_table(committed("minilm_study")),
        "fashion_study": fashion_study.make_table(fashion_study.committed()),
        "fashion_rates": fashion_study.make_rates_table(fashion_study.committed()),
        "peers_fashion": peers.make_table(peers.committed()),
        "peers_rates": peers.make_rates_table(peers.committed()),
        "detection_study": detection.make_table(detection.committed()),
        "detection_tests": detection.make_tests_table(detection.committed()),
        "detection_rates": detection.make_rates_table(detection.committed()),
        "qkd_study": qkd_study.make_table(qkd_study.committed()),
        "qkd_rates": qkd_study.make_rates_table(qkd_study.committed()),
    }
    for name, table in made.items():
        assert page_tables.read_table(name, fashion_study.PAGE) == table, name


def test_the_table_of_what_to_choose_is_made_from_the_committed_figures():
    table = evidence_page.tables.make_choice_table(committed("evidence"))
    assert page_tables.read_table("evidence_choice", evidence_page.CHOICE) == table


def test_the_table_of_augmentations_on_garments_is_made_from_the_committed_figures():
    study = evidence_page.augmentation_study
    table = study.make_fashion_table(study.fashion_committed())
    assert page_tables.read_table("augmentation_fashion", study.FASHION_PAGE) == table


def test_the_table_of_the_default_rate_is_made_from_the_committed_figures():
    script = import_module("default_rate")
    assert page_tables.read_table("default_rate", script.PAGE) == script.make_table(committed("default_rate"))


def test_the_table_of_calibration_is_made_from_the_committed_figures():
    script = import_module("calibration_images")
    assert page_tables.read_table("calibration_images", script.PAGE) == script.make_table(committed("calibration_images"))


def test_the_zoo_is_made_from_the_committed_cells():
    zoo = import_module("zoo")
    cells = json.loads(zoo.RESULTS.read_text())["cells"]
    assert page_tables.read_table("zoo") == zoo.make_table(cells)
    assert page_tables.read_table("zoo-summary") == zoo.make_summary(cells)


def test_a_table_without_markers_is_refused_and_the_file_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no table 'step'"):
        page_tables.write_table("step", "| a |", page)
    assert page.read_text() == "no markers"


def test_a_table_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- a:begin -->\nold\n<!-- a:end -->\nbelow\n")
    page_tables.write_table("a", page_tables.markdown(["x"], [["1"]]), page)
    assert page.read_text() == "above\n<!-- a:begin -->\n| x |\n| --- |\n| 1 |\n<!-- a:end -->\nbelow\n"


def test_the_table_of_large_runs_is_made_from_the_committed_figures():
    script = import_module("scale")
    assert page_tables.read_table("scale", script.PAGE) == script.make_table(committed("scale"))
