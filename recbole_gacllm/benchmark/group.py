"""The LaTeX tables of RecBole's ``run_recbole_group.py``: validation and test, one row a model."""

from __future__ import annotations

import statistics
from pathlib import Path

from recbole.utils import list_to_latex

from recbole_gacllm.benchmark import cells
from recbole_gacllm.benchmark.results import Board


def write_latex(board: Board, dataset: str, part: str, file: Path) -> None:
    """Write one table with RecBole's own function; means over seeds where there are several.

    Args:
        board: A leaderboard with at least one finished run of the data set.
        dataset: Name of the data set.
        part: ``valid`` or ``test``.
        file: ``.tex`` file to write; its folder is made if need be.
    """
    rows = []
    for model in board.plan["models"]:
        runs = board.of(dataset, model)
        metrics = runs[0].record[part] if runs else {}
        means = {
            metric: statistics.fmean(run.record[part][metric] for run in runs) for metric in metrics
        }
        if means:
            rows.append({"Model": cells.latex(model), **means})
    bigger = all(run.record["config"]["valid_metric_bigger"] for run in board.of(dataset))
    columns = [name for name in rows[0] if name != "Model"]
    _, text = list_to_latex(rows, bigger_flag=bigger, subset_columns=columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
