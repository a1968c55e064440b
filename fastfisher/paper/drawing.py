"""What the figures share: a colour for each method, curves with their spread over seeds, bars, points, histograms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastfisher.paper.cases import Key
from fastfisher.paper.experiment import Outcome, Quantity, series

# Okabe and Ito's palette, which colour-blind readers tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
COLOURS = {
    "η*": "#000000",
    "baseline": "#D55E00",
    "GP_x": "#E69F00",
    "GP": "#009E73",
    "FP": "#0072B2",
    "GP_r": "#CC79A7",
    "mixup": "#56B4E9",
}


def colour(name: str, index: int) -> str:
    """Return the colour of a method, or of a curve by its number."""
    return COLOURS.get(name, PALETTE[index % len(PALETTE)])


def ramp(count: int) -> list[Any]:
    """Return colours from blue to red for values in order."""
    return [matplotlib.colormaps["coolwarm"](each) for each in np.linspace(0.0, 1.0, max(count, 2))][:count]


def panels(figure: Figure, rows: int, columns: int) -> list[Axes]:
    """Return axes in reading order, without the lines that frame nothing."""
    found = list(np.asarray(figure.subplots(rows, columns, squeeze=False)).flat)
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
    return found


def curves(
    axes: Axes,
    outcome: Outcome,
    lines: Mapping[str, Key],
    name: str,
    label: str,
    *,
    factor: float = 1.0,
    logarithmic: bool = False,
    colours: Sequence[Any] | None = None,
    style: str = "-",
) -> None:
    """Draw a measurement over the epochs: for each line the mean over seeds, and their range."""
    for index, (title, key) in enumerate(lines.items()):
        shown = colour(title, index) if colours is None else colours[index]
        by_epoch: dict[float, list[float]] = {}
        for run in outcome.runs[key].values():
            for epoch, value in zip(*series(run, name), strict=True):
                by_epoch.setdefault(epoch, []).append(factor * value)
        if not by_epoch:
            continue
        epochs = sorted(by_epoch)
        values = [by_epoch[epoch] for epoch in epochs]
        axes.plot(epochs, [float(np.mean(each)) for each in values], style, color=shown, label=title, linewidth=1.5)
        if max(map(len, values)) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            axes.fill_between(epochs, low, high, color=shown, alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)


def over_epochs(
    *shown: tuple[str, str, float], beginning: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Callable[[Figure, Outcome], None]:
    """Return what draws a panel for each measurement (name, label, factor) and in it a curve for each case.

    The cases, of those whose names begin so and are not left out, are in order, from blue to red.
    """

    def draw(figure: Figure, outcome: Outcome) -> None:
        lines = {name: key for name, key in outcome.lines(*beginning).items() if name not in without}
        colours = ramp(len(lines))
        axes = panels(figure, 1, len(shown))
        for each, (name, label, factor) in zip(axes, shown, strict=True):
            curves(each, outcome, lines, name, label, factor=factor, colours=colours)
        legend(axes[0])

    return draw


TRACE = ("trace_fisher", "Tr(F)", 1.0)
VALIDATION = ("validation_accuracy", "validation accuracy, %", 100.0)


def row_panels(figure: Figure, outcome: Outcome) -> Iterator[tuple[Axes, str]]:
    """Yield axes for each row of cases; what is drawn gets the row's name and a legend."""
    rows = outcome.rows()
    for axes, row in zip(panels(figure, 1, len(rows)), rows, strict=True):
        yield axes, row
        axes.set_title(row, fontsize="medium")
        legend(axes)


def bars(axes: Axes, outcome: Outcome, columns: Sequence[str], quantity: Quantity) -> None:
    """Draw a table: a group for each row, in it a bar with mean and standard deviation for each column."""
    rows = outcome.rows()
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        places, means, errors = [], [], []
        for row_number, row in enumerate(rows):
            found = outcome.summary((row, column), quantity) if (row, column) in outcome.runs else None
            if found is not None:
                places.append(row_number + (number - (len(columns) - 1) / 2) * width)
                means.append(found.mean)
                errors.append(found.std or 0.0)
        axes.bar(places, means, width, yerr=errors, label=column, color=colour(column, number), capsize=2)
    axes.set_xticks(range(len(rows)), [row.replace(" / ", "\n") for row in rows])
    axes.set_ylabel(quantity.name)


def points(
    axes: Axes, outcome: Outcome, lines: Mapping[str, Key], x: Quantity, y: Quantity, *, each_seed: bool = True
) -> None:
    """Draw a point for each case, the means over seeds with their standard deviations, and small ones for each seed."""
    for (title, key), shown in zip(lines.items(), ramp(len(lines)), strict=True):
        across, up = outcome.summary(key, x), outcome.summary(key, y)
        if across is None or up is None:
            continue
        axes.errorbar(across.mean, up.mean, up.std or 0.0, across.std or 0.0, "o", color=shown, label=title, capsize=2)
        if each_seed:
            by_seed = outcome.values(key, x), outcome.values(key, y)
            seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
            xs, ys = ([values[seed] for seed in seeds] for values in by_seed)
            axes.scatter(xs, ys, s=8, color=shown, alpha=0.5)
    axes.set_xlabel(x.name)
    axes.set_ylabel(y.name)


def histograms(axes: Axes, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Draw how often values occur, for each name in a colour of its own."""
    together = [value for each in values.values() for value in each]
    if not together:
        return
    edges = np.histogram_bin_edges(together, bins=12)
    for index, (title, each) in enumerate(values.items()):
        axes.hist(each, edges.tolist(), alpha=0.6, label=title, color=colour(title, index))
    axes.set_xlabel(label)
    axes.set_ylabel("runs")


def legend(axes: Axes, **options: Any) -> None:
    """Name what was drawn, if anything was."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**{"fontsize": "small", "frameon": False, **options})


def table_of_bars(quantity: Quantity, columns: Sequence[str]) -> Callable[[Figure, Outcome], None]:
    """Return what draws a table as bars."""

    def draw(figure: Figure, outcome: Outcome) -> None:
        (axes,) = panels(figure, 1, 1)
        bars(axes, outcome, columns, quantity)
        legend(axes, ncols=len(columns), loc="upper center", bbox_to_anchor=(0.5, 1.12))

    return draw


def accuracy_and_trace(figure: Figure, outcome: Outcome, *, ordered: bool = False) -> None:
    """Validation accuracy and Tr(F) over training, a row of two panels for each row of cases.

    ``ordered``: the columns are values of one option, from blue to red.
    """
    rows = outcome.rows()
    axes = panels(figure, len(rows), 2)
    for number, row in enumerate(rows):
        left, right = axes[2 * number : 2 * number + 2]
        lines = outcome.lines(row)
        colours = ramp(len(lines)) if ordered else None
        curves(left, outcome, lines, "validation_accuracy", "validation accuracy, %", factor=100, colours=colours)
        curves(right, outcome, lines, "trace_fisher", "Tr(F)", colours=colours)
        left.set_title(row, fontsize="medium")
        legend(left)
