"""A ranking as a file of its own."""

import json
from xml.etree import ElementTree

import pytest

from qakd_plugin import QakdError
from qakd_plugin.report.ranking import draw_ranking, ranking_plot

SVG = "{http://www.w3.org/2000/svg}"
RECORDS = [
    {"name": "mixup<&>\x00", "form": "ce", "cmi": 1.0, "cross_entropy": 0.25, "tied_with_best": True, "dropped": False},
    {"name": "none", "form": "ce", "cmi": 0.5, "cross_entropy": 0.5, "tied_with_best": True, "dropped": False},
    {"name": "cutmix", "form": "ce", "cmi": 0.25, "cross_entropy": 0.5, "tied_with_best": False, "dropped": False},
    {"name": "erasing", "form": "ce", "cmi": 0.0, "cross_entropy": 2.0, "tied_with_best": False, "dropped": True},
]


def test_every_record_is_drawn_where_its_figures_put_it():
    plot = ranking_plot(RECORDS, "Ranking")
    by_name = {point.name: point for point in plot.points}
    for part, sign, place in (("cross_entropy", 1, "x"), ("cmi", -1, "y")):
        for one in RECORDS:
            for other in RECORDS:
                apart = getattr(by_name[one["name"]], place) - getattr(by_name[other["name"]], place)
                values = sign * (one[part] - other[part])
                assert (apart > 0) - (apart < 0) == (values > 0) - (values < 0)
    assert [point.is_best for point in plot.points] == [True, False, False, False]
    assert [point.tone for point in plot.points] == ["distilled", "distilled", "qat", "float"]


def test_points_of_equal_score_lie_on_one_line():
    records = [{"name": str(k), "form": "centroid", "cmi": 0.5 + k, "centroid_divergence": 0.1 + k} for k in range(4)]
    plot = ranking_plot(records, "Ranking")
    assert plot.x_name == "centroid divergence"
    x1, y1, x2, y2 = plot.diagonals[0]
    for point in plot.points:
        assert (point.y - y1) * (x2 - x1) == pytest.approx((y2 - y1) * (point.x - x1))


def test_the_file_is_xml_that_loads_nothing_and_holds_names_as_text(tmp_path):
    path = draw_ranking(json.loads(json.dumps(RECORDS)), tmp_path / "mine.v2")
    assert path.name == "mine.v2.svg"
    root = ElementTree.parse(path).getroot()
    names = [title.text for title in root.iter(f"{SVG}title")]
    assert names == ["mixup<&>\N{REPLACEMENT CHARACTER}", "none", "cutmix", "erasing"]
    _, _, width, height = map(float, root.get("viewBox").split())
    for circle in root.iter(f"{SVG}circle"):
        assert 0 < float(circle.get("cx")) < width
        assert 0 < float(circle.get("cy")) < height
    assert path.read_text().count("http") == 1, "the name space"


def test_a_ranking_without_figures_is_refused(tmp_path):
    with pytest.raises(QakdError, match="records"):
        draw_ranking([{"name": "none", "cmi": float("nan"), "cross_entropy": 1.0}], tmp_path / "r.svg")
    assert not any(tmp_path.iterdir())
