"""Heat map of the fraction of correct answers by length and depth."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

# Fractions with light cells: outside of them, numbers are white to be legible.
LIGHT = (0.2, 0.8)


def draw_heat_map(
    path: Path,
    *,
    shares: Sequence[Sequence[float]],
    lengths: Sequence[str],
    depths: Sequence[float],
    title: str,
) -> None:
    """Write a heat map as PNG; `shares` are fractions by depth, then by length."""
    size = (max(5.0, 2.4 + 0.85 * len(lengths)), max(3.0, 1.9 + 0.42 * len(depths)))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, by_length in enumerate(shares):
        for column, share in enumerate(by_length):
            color = "white"
            if LIGHT[0] <= share <= LIGHT[1]:
                color = "black"
            axes.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=9
            )
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xticks([x - 0.5 for x in range(1, len(lengths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="length of the prompt", ylabel="depth of the needle")
    axes.set_title(title, fontsize=11)
    figure.colorbar(
        image, ax=axes, label="codes found, %", format=lambda share, _: f"{100 * share:.0f}"
    )
    figure.savefig(path)
