"""The picture of ε against rounds: every number in its place, in a file that needs nothing else."""

from xml.etree import ElementTree

import pytest

from fedlora.style import LIMIT
from fedlora_client.spending_chart import BOTTOM, LEFT, PLANNED, RIGHT, SPENT, TOP, spending_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(planned, started, title="north, run ab"):
    """Return the picture's lines, (colour, corners) each, and its words, read back from the file."""
    root = ElementTree.fromstring(spending_chart(title, 1e-5, planned, started).encode())
    lines = [(line.get("stroke"), [tuple(map(float, corner.split(","))) for corner in line.get("points").split()])
             for line in root.iter(f"{SVG}polyline")]
    return lines, [text.text for text in root.iter(f"{SVG}text")]


def line(lines, colour):
    """Return the corners of the plotted line of a colour; the legend's sample comes after it."""
    return next(corners for stroke, corners in lines if stroke == colour)


def test_the_lines_go_through_what_was_computed_and_the_guarantee_is_the_last_of_it():
    lines, words = drawn([(1, 2.0), (4, 4.0), (10, 8.0)], started=4)
    spent, planned, limit = (line(lines, colour) for colour in (SPENT, PLANNED, LIMIT))
    assert spent == planned[:2] and len(planned) == 3
    assert limit[0] == (LEFT, planned[-1][1]) and limit[1] == (RIGHT, planned[-1][1])
    (x1, y1), (x4, y4), (x10, y10) = planned
    assert (x4 - LEFT, x10 - LEFT) == pytest.approx((4 * (x1 - LEFT), 10 * (x1 - LEFT)), rel=0.01)
    assert (BOTTOM - y4, BOTTOM - y10) == pytest.approx((2 * (BOTTOM - y1), 4 * (BOTTOM - y1)), rel=0.01)
    assert "4 rounds started: ε 4.000" in words and "guarantee for 10 rounds: ε 8.000" in words
    assert "ε at δ = 1e-05" in words and "rounds started" in words


@pytest.mark.parametrize("guarantee", [1e-7, 0.004, 0.37, 1.0, 8.0, 9.99, 121.4, 5e6])
@pytest.mark.parametrize("most", [1, 2, 3, 20, 1000])
def test_whatever_the_numbers_the_lines_are_inside_the_axes_and_the_ticks_are_few_and_rise(guarantee, most):
    lines, words = drawn([(1, guarantee / most), (most, guarantee)] if most > 1 else [(1, guarantee)], started=1)
    for _, corners in lines:
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM + 5 for x, y in corners)
    numbers = [float(word) for word in words[1:words.index("rounds started")]]
    split = numbers.index(0.0, 1)  # the ticks of ε come first, and both begin at 0
    for ticks, end, fewest in ((numbers[:split], guarantee, 3), (numbers[split:], most, min(3, most + 1))):
        assert ticks == sorted(set(ticks)) and fewest <= len(ticks) <= 10, ticks
        assert end / 2 < ticks[-1] <= 1.06 * end
    assert all(number == int(number) for number in numbers[split:])


def test_a_title_is_text_whatever_it_holds():
    title = 'ward <7> & "co"\x07\ud800 é'
    _, words = drawn([(1, 2.0)], 1, title)
    assert words[0] == 'ward <7> & "co"\ufffd\ufffd é'
