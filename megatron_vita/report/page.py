"""The frame of the project's HTML reports: one file that needs nothing else."""

from html import escape
from pathlib import Path

COLORS = ("#3b6ea5", "#d98c3f", "#5a9e6f", "#b5576b", "#7d6bb0", "#4fa3a5", "#a08a3c", "#8a8f98")
STYLE = (Path(__file__).parent / "page.css").read_text()


def html_page(body: str, *, title: str) -> str:
    """A whole page around `body`."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>"
    )


def cards(values: dict[str, str]) -> str:
    """Large numbers with their names."""
    found = "".join(
        f"<div><b>{value}</b><span>{name}</span></div>" for name, value in values.items()
    )
    return f'<section class="cards">{found}</section>'


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table; cells are HTML."""
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figures(charts: dict[str, str], *, kind: str = "charts") -> str:
    """Charts with their captions."""
    found = "".join(
        f"<figure><figcaption>{name}</figcaption>{chart}</figure>" for name, chart in charts.items()
    )
    return f'<div class="{kind}">{found}</div>'
