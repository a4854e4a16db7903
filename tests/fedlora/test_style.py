"""Curves of a picture are told apart: without seeing all colours, and where they coincide."""

from itertools import combinations

import pytest

from fedlora import style

SEEN = {  # what a viewer sees of linear red, green and blue (Machado, Oliveira, Fernandes 2009, severity 1)
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour):
    shares = (int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5))
    return [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]


def luminance(colour):
    return sum(weight * share for weight, share in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(colour, seen):
    """Return the colour in CIELAB, in which a distance of about 2 is just noticeable."""
    red, green, blue = (min(1, max(0, sum(map(float.__mul__, map(float, row), linear(colour))))) for row in seen)
    x, y, z = ((0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505,
               0.2126 * red + 0.7152 * green + 0.0722 * blue,
               (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089)
    x, y, z = (share ** (1 / 3) if share > 0.008856 else 7.787 * share + 16 / 116 for share in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


ON_DARK = tuple(style.ON_DARK[colour] for colour in style.COLOURS)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("colours", [style.COLOURS, ON_DARK], ids=["light", "dark"])
def test_colours_are_told_apart_by_the_colour_blind(colours, seen):
    for one, other in combinations(colours, 2):
        distance = sum((a - b) ** 2 for a, b in zip(lab(one, SEEN[seen]), lab(other, SEEN[seen]), strict=True)) ** 0.5
        assert distance > 15, (one, other)


def test_colours_stand_out_from_the_paper():
    assert contrast(style.INK, style.PAPER) > 7
    assert min(contrast(colour, style.PAPER) for colour in style.COLOURS) > 3
    dark = style.ON_DARK[style.PAPER]
    assert contrast(style.ON_DARK[style.INK], dark) > 7
    assert min(contrast(colour, dark) for colour in ON_DARK) > 3


def test_no_curve_is_told_from_another_by_its_colour_alone():
    looks = [style.series(index) for index in range(36)]
    assert len({(look.colour, look.dashes) for look in looks}) == 36
    assert len({look.dashes for look in looks[:6]}) == len({look.marker for look in looks[:6]}) == 6
    widths = [look.width for look in looks[:6]]
    assert widths == sorted(widths, reverse=True), "a later curve leaves the edges of an earlier one visible"
    assert "marker" in looks[0].line(style.MARKED) and "marker" not in looks[0].line(style.MARKED + 1)
