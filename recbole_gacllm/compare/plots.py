"""A leaderboard's table as a figure for a paper: SVG and PNG, the same bytes from the same table.

One panel has each method's mean with its 95 % interval over users, the others its means by the
degree of users and items. A method has one colour and one marker in all of them.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from recbole_gacllm.compare.markdown import metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X<"  # nine beside ten colours: no two of ninety methods look alike
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "recbole_gacllm",  # ids in the file, random without
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar in a name is one
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 200,
}
#: Format -> what matplotlib would write into the file: time and version.
METADATA: dict[str, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}


def draw(table: dict[str, Any], title: str, metric: str) -> dict[str, bytes]:
    """:func:`figure` by format: ``svg`` and ``png``."""
    from matplotlib import rc_context

    files = {}
    for kind, metadata in METADATA.items():
        with rc_context(STYLE):
            figure(table, title, metric).savefig(
                content := io.BytesIO(), format=kind, metadata=metadata
            )
        files[kind] = content.getvalue()
    return files


def figure(table: dict[str, Any], title: str, metric: str) -> Figure:
    """The figure of one data set.

    Args:
        table: Of :func:`.results.summarize`.
        title: Of the whole.
        metric: What is drawn, such as ``ndcg@10``; the first of the table where that has it not.
    """
    from matplotlib.figure import Figure

    metric = metric if metric in table["metrics"] else table["metrics"][0]
    sides = {side: of_side for side, of_side in table["by_degree"].items() if of_side["models"]}
    n_models, n_panels = len(table["models"]), 1 + len(sides)
    made = Figure(figsize=(3.6 * n_panels, 1.4 + 0.28 * max(n_models, 5)), layout="constrained")
    panels = list(made.subplots(1, n_panels, squeeze=False)[0])
    made.suptitle(title)
    looks: dict[str, dict[str, Any]] = {
        model: {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)]}
        for number, model in enumerate(table["models"])
    }
    _intervals(panels[0], table["models"], metric, looks)
    for panel, (side, of_side) in zip(panels[1:], sides.items(), strict=True):
        _by_degree(panel, side, of_side, metric, looks)
    return made


def _intervals(
    panel: Axes, models: dict[str, Any], metric: str, looks: dict[str, dict[str, Any]]
) -> None:
    for place, (model, row) in enumerate(models.items()):
        cell, look = row["metrics"][metric], looks[model]
        if cell["interval"] is not None:
            panel.plot(cell["interval"], [place, place], color=look["color"])
        panel.plot([cell["mean"]], [place], linestyle="none", **look)
    panel.set_yticks(range(len(models)), list(models))
    for label, look in zip(panel.get_yticklabels(), looks.values(), strict=True):
        label.set_color(look["color"])
    panel.invert_yaxis()
    panel.set_xlabel(f"{metric_name(metric)}, mean and 95 % interval over users")
    panel.grid(axis="x", alpha=0.3)


def _by_degree(
    panel: Axes, side: str, of_side: dict[str, Any], metric: str, looks: dict[str, dict[str, Any]]
) -> None:
    names = dict.fromkeys(name for cells in of_side["models"].values() for name in cells)
    drawn = metric if metric in names else next(iter(names))
    for model, cells in of_side["models"].items():
        means = [cell["mean"] for cell in cells.get(drawn, [])]
        values = [float("nan") if mean is None else mean for mean in means]
        panel.plot(range(len(values)), values, markersize=4, linewidth=1, **looks[model])
    panel.set_xticks(range(len(of_side["buckets"])), of_side["buckets"], rotation=30)
    panel.set_xlabel(f"training interactions of the {side}")
    panel.set_ylabel(drawn if drawn.startswith("found") else metric_name(drawn))
    panel.grid(axis="y", alpha=0.3)
