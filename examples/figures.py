"""Figures and pictures inside of an HTML page."""

import base64
import io

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}


def svg(figure: Figure) -> Markup:
    """Draw a figure as an element of a page."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg")
    drawn = text.getvalue()
    return Markup(drawn[drawn.index("<svg") :])


def png_url(content: bytes) -> str:
    """Return a PNG as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
