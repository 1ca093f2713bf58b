"""Pictures of an experiment's results, as PNG and PDF.

    pictures:
      accuracy: {kind: curve, x: budget, y: judged.top1_converged, lines: loss, label: "copy's accuracy (%)"}
      table: {kind: heat, x: attack, y: defence, of: judged.top1_converged, label: "copy's accuracy (%)"}
      sides: {kind: sides, copy: judged.top1_converged, user: user.top1_converged, lines: defence, at: {attack: mse}}
      found: {kind: roc, of: streams.roc, curves: {plain queries: task_plain_coverage}}
      maps: {kind: map, of: judged.map, lines: attack}

curve: a line over an axis of numbers for each value of `lines`, with its interval as a band. heat: a figure at two
axes. sides: what is left to a user against what a copy reaches, a line through the strengths of each defence. roc:
the curves with these names in the rows of a step, each the mean of its runs' curves. map: the plane maps in the rows of
a step, the victim's first, then those of the encoders at each value of `lines`, of the first seeds. `at` gives the
values of further axes; an axis without a value there takes its first.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.grid import Grid
from experiments.parts import part_of
from experiments.results import Estimate, Results
from files.reading import Check, table, text
from files.writing import atomic_path
from utils import UserError

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and dashes tell them apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A800")
MARKERS = "osD^vPX*<>"
DASHES = ("-", "--", "-.", ":")

_COMMON: dict[str, Check] = {"kind": text(), "label": text(), "at": table(text())}
_KINDS: dict[str, dict[str, Check]] = {
    "curve": _COMMON | {"x": text(), "y": text(), "lines": text(), "x_label": text()},
    "heat": _COMMON | {"x": text(), "y": text(), "of": text()},
    "sides": _COMMON | {"copy": text(), "user": text(), "lines": text()},
    "roc": _COMMON | {"of": text(), "curves": table(text())},
    "map": _COMMON | {"of": text(), "lines": text()},
}
_AXES = {"curve": ("x", "lines"), "heat": ("x", "y"), "sides": ("lines",), "roc": (), "map": ("lines",)}
_FIGURES = {"curve": ("y",), "heat": ("of",), "sides": ("copy", "user"), "roc": ("of",), "map": ("of",)}
_ALSO = {"roc": ("curves",)}
PARTS: dict[str, Check] = {"pictures": table()}


def declared_pictures(grid: Grid) -> dict[str, Mapping[str, Any]]:
    """The pictures that the file asks for, by name. UserError for what is none."""
    for name, picture in grid.content.get("pictures", {}).items():
        where = f"{grid.path}: picture {name!r}"
        kind = picture.get("kind") if isinstance(picture, Mapping) else None
        if kind not in _KINDS:
            raise UserError(f"{where} is of kind {kind!r}: give {', '.join(_KINDS)}")
        part_of(picture, _KINDS[kind], where, needed=(*_AXES[kind], *_FIGURES[kind], *_ALSO.get(kind, ())))
        grid.check_axes([picture[part] for part in _AXES[kind]], where)
        grid.check_values(picture.get("at", {}), f"{where}, at")
        for part in _FIGURES[kind]:
            grid.check_figure(picture[part], where)
    return dict(grid.content.get("pictures", {}))


def draw(grid: Grid, results: Results, folder: Path) -> list[Path]:
    """Draw the pictures that have anything to show, as `folder`/NAME.png and .pdf; their PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, picture in declared_pictures(grid).items():
        figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
        if _DRAW[picture["kind"]](axes, grid, results, picture):
            for ending in ("png", "pdf"):
                with atomic_path(folder / f"{name}.{ending}") as temporary:
                    # Without the date, so that the same results give the same file.
                    when = {"CreationDate": None} if ending == "pdf" else {}
                    figure.savefig(temporary, format=ending, dpi=160, metadata=when)
            drawn.append(folder / f"{name}.png")
        pyplot.close(figure)
    return drawn


def _point(grid: Grid, picture: Mapping, **at: str) -> dict[str, str]:
    """The point with these values, the picture's own, and the first of each other axis."""
    return {**{axis: values[0].name for axis, values in grid.axes.items()}, **picture.get("at", {}), **at}


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        "markersize": 5,
    }


def _curve(axes: Any, grid: Grid, results: Results, picture: Mapping) -> bool:
    places = sorted((float(value.name), value.name) for value in grid.axes[picture["x"]])
    for number, line in enumerate(grid.axes[picture["lines"]]):
        points = [
            (
                x,
                results.estimate(
                    picture["y"], _point(grid, picture, **{picture["x"]: name, picture["lines"]: line.name})
                ),
            )
            for x, name in places
        ]
        points = [(x, estimate) for x, estimate in points if estimate]
        if not points:
            continue
        x, means = zip(*((x, estimate.mean) for x, estimate in points), strict=True)
        axes.plot(x, means, label=line.name, **_style(number))
        ends = [(x, estimate.low, estimate.high) for x, estimate in points if estimate.low is not None]
        if ends:
            axes.fill_between(*zip(*ends, strict=True), color=COLOURS[number % len(COLOURS)], alpha=0.15, linewidth=0)
    axes.set(xlabel=picture.get("x_label", picture["x"]), ylabel=picture.get("label", picture["y"]))
    axes.set_xscale("log")
    axes.set_xticks([x for x, _ in places], [f"{x:,.0f}" for x, _ in places])
    axes.minorticks_off()
    return _legend_below(axes)


def _heat(axes: Any, grid: Grid, results: Results, picture: Mapping) -> bool:
    columns, lines = ([value.name for value in grid.axes[picture[part]]] for part in ("x", "y"))
    found: dict[tuple[int, int], Estimate] = {}
    for (i, line), (j, column) in itertools.product(enumerate(lines), enumerate(columns)):
        at = _point(grid, picture, **{picture["x"]: column, picture["y"]: line})
        estimate = results.estimate(picture["of"], at)
        if estimate:
            found[i, j] = estimate
    if not found:
        return False
    shades = np.full((len(lines), len(columns)), np.nan)
    for place, estimate in found.items():
        shades[place] = estimate.mean
    image = axes.imshow(shades, cmap="cividis", aspect="auto")
    middle = (np.nanmin(shades) + np.nanmax(shades)) / 2
    for (i, j), estimate in found.items():
        colour = "white" if estimate.mean < middle else "black"
        axes.text(j, i, f"{estimate.mean:.1f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(lines)), lines)
    axes.figure.set_size_inches(2.5 + 0.9 * len(columns), 1.5 + 0.3 * len(lines))
    axes.figure.colorbar(image, label=picture.get("label", picture["of"]))
    return True


def _sides(axes: Any, grid: Grid, results: Results, picture: Mapping) -> bool:
    from adjustText import adjust_text

    texts: list[Any] = []
    families = dict.fromkeys(value.family for value in grid.axes[picture["lines"]])
    for number, family in enumerate(families):
        points = []
        for value in grid.axes[picture["lines"]]:
            at = _point(grid, picture, **{picture["lines"]: value.name})
            copy, user = results.estimate(picture["copy"], at), results.estimate(picture["user"], at)
            if value.family == family and copy and user:
                points.append((copy.mean, user.mean, value.strength))
        if points and family == "none":  # what all others are compared with
            axes.scatter(*points[0][:2], marker="*", s=180, color="black", label="no defence", zorder=3)
        elif points:
            # Points in the same place show through each other.
            axes.plot(*zip(*((x, y) for x, y, _ in points), strict=True), label=family, alpha=0.75, **_style(number))
            texts += [axes.text(x, y, strength, fontsize=7) for x, y, strength in points if strength]
    axes.set(xlabel="copy's accuracy (%)", ylabel="user's accuracy (%)")
    named = _legend_below(axes)
    if texts:
        axes.figure.canvas.draw()  # the layout is made now; no text lies over another then, or over a point
        places = [line.get_xydata() for line in axes.lines]
        adjust_text(texts, *np.concatenate(places).T, ax=axes, expand=(1.5, 2.0), iter_lim=500)
    return named


def _roc(axes: Any, grid: Grid, results: Results, picture: Mapping) -> bool:
    step, _, name = picture["of"].partition(".")
    rows = [row[name] for _, row in results.rows(step, _point(grid, picture)) if isinstance(row.get(name), Mapping)]
    shares = np.linspace(0, 1, 201)
    for number, (label, curve) in enumerate(picture["curves"].items()):
        known = [np.array(row[curve]) for row in rows if curve in row]
        if not known:
            continue
        # At a share of false alarms, the greatest share of attacks that no more false alarms find.
        found = [points[np.searchsorted(points[:, 0], shares, side="right") - 1, 1] for points in known]
        style = {**_style(number), "marker": "", "linestyle": DASHES[number % len(DASHES)]}
        axes.plot(shares, np.mean(found, axis=0), drawstyle="steps-post", label=f"{label} (n {len(known)})", **style)
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
    axes.set(xlabel="users' streams flagged (share)", ylabel="attackers' streams flagged (share)", aspect="equal")
    return _legend_below(axes)


def _map(axes: Any, grid: Grid, results: Results, picture: Mapping) -> bool:
    step, _, name = picture["of"].partition(".")
    panels: dict[str, tuple[list, list]] = {}
    for value in grid.axes[picture["lines"]]:
        rows = results.rows(step, _point(grid, picture, **{picture["lines"]: value.name}))
        found = rows[0][1].get(name) if rows else None
        if isinstance(found, Mapping):
            if "victim" in found:  # of several victims, as where one is untrained, the first
                panels.setdefault("victim", (found["victim"], found["labels"]))
            panels[value.name] = found["encoder"], found["labels"]
    figure, columns = axes.figure, min(4, max(1, len(panels)))
    axes.remove()
    lines = -(-len(panels) // columns)
    figure.set_size_inches(2.2 * columns, 2.4 * max(1, lines))
    for number, (title, (points, labels)) in enumerate(panels.items(), 1):
        ends = (-1.05, 1.05)
        panel = figure.add_subplot(lines, columns, number, aspect="equal", xticks=[], yticks=[], xlim=ends, ylim=ends)
        panel.scatter(*zip(*points, strict=True), c=labels, cmap="tab10", s=5, linewidths=0)
        panel.set_title(title, fontsize=8)
    return bool(panels)


def _legend_below(axes: Any) -> bool:
    """Put the legend outside of the axes, where no point is; whether there is anything to name."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        axes.grid(alpha=0.25)
    return bool(handles)


_DRAW: dict[str, Callable[[Any, Grid, Results, Mapping], bool]] = {
    **{"curve": _curve, "heat": _heat, "sides": _sides},
    **{"roc": _roc, "map": _map},
}
