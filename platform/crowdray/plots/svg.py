"""Figures as SVG inside an HTML page, whose style sheet decides on their font and colours, light or dark."""

import io
import re
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text

from crowdray.errors import escaped
from crowdray.plots import style

THEME = {
    **{style.INK: "--ink", style.FAINT: "--faint", style.PAPER: "--bar", "#d0d7de": "--grid", "#afb8c1": "--axis"},
    **{style.BLUE: "--blue", style.ORANGE: "--orange", style.GREEN: "--green"},
    **{style.PINK: "--pink", style.SKY: "--sky", style.VERMILION: "--vermilion"},
}
"""Custom property of the page that replaces each colour of a figure; other colours stay."""

_IDS = re.compile(r'(\bid="|url\(#|href="#)')
_COLOURS = re.compile(f'({"|".join(THEME)})(?=[;"])')


def inline_svg(figure: Figure, name: str) -> str:
    """Render a figure with a transparent background as an <svg> element that fills the width of its container.

    Formulas and control characters in its texts are shown as they are.

    Args:
        figure: The figure.
        name: Prefix of the identifiers in the element, unique in the page.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text("\n".join(map(escaped, text.get_text().split("\n"))))
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "DejaVu Sans"}):
        canvas: Any = FigureCanvasSVG(figure)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(buffer, metadata=metadata)
    content = buffer.getvalue()
    content = re.sub(
        r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', content[content.index("<svg") :], count=1
    )
    content = _IDS.sub(rf"\g<1>{name}-", content.replace("xlink:href", "href"))
    return _COLOURS.sub(lambda match: f"var({THEME[match[1]]})", content)
