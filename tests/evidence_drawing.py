"""What the figure of the evidence shows, read from its file: figures, whatever version of matplotlib drew them."""

import re
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
_MOVE = re.compile(r"[ML] (-?[\d.]+) (-?[\d.]+)")


def places_of(text):
    """Places (x, y) of each named group: of its marks, or else of the ends of its lines."""
    places = {}
    for group in ElementTree.fromstring(text).iter(f"{SVG}g"):
        if re.fullmatch(r"[A-Za-z]+-(QAT|SQAKD|teacher|zero|difference)(-interval|-W\dA\d)?", group.get("id", "")):
            marks = [(float(mark.get("x")), float(mark.get("y"))) for mark in group.iter(f"{SVG}use")]
            lines = [tuple(map(float, place)) for path in group.findall(f"{SVG}path") for place in _MOVE.findall(path.get("d"))]
            places[group.get("id")] = marks or lines
    return places


def bars(drawing, name):
    """Heights of the two ends of each interval."""
    heights = [y for _, y in drawing[f"{name}-interval"]]
    return list(zip(heights[::2], heights[1::2], strict=True))
