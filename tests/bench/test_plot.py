"""The plot is well-formed, the same each time, and lower KL is lower on the page."""

from xml.etree import ElementTree

from bench.plot import svg

CURVES = {"a": [(4.5, 0.01), (8.5, 0.0)], "b<": [(2.0, 0.03), (1.5, 0.2)]}
SVG = "{http://www.w3.org/2000/svg}"


def test_every_level_is_a_point_and_every_codec_a_line() -> None:
    root = ElementTree.fromstring(svg(CURVES, "title", budget=0.01))
    assert len(root.findall(f"{SVG}polyline")) == 2
    assert len([circle for circle in root.findall(f"{SVG}circle") if circle.get("r") == "3"]) == 4
    assert "b<" in [text.text for text in root.findall(f"{SVG}text")]


def test_less_is_further_left_and_further_down() -> None:
    root = ElementTree.fromstring(svg(CURVES, "title", budget=0.01))
    lines = {line.get("stroke"): line.get("points", "").split() for line in root.findall(f"{SVG}polyline")}
    (few, many) = (tuple(map(float, place.split(","))) for place in list(lines.values())[1])
    assert few[0] < many[0] and few[1] < many[1], "fewer bits, more KL: left and, in pixels from the top, above"


def test_nothing_to_draw_is_still_a_picture() -> None:
    assert ElementTree.fromstring(svg({}, "title", budget=0.01)).tag == f"{SVG}svg"
