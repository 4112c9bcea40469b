"""What each kind of text is worth, as one picture: results/texts/ml-100k.svg.

    python benchmarks/texts_figure.py

A panel a page of results/texts: test NDCG@10 of each split (small) and their mean.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from recbole_gacllm.compare.plots import METADATA, STYLE

TEXTS = Path(__file__).parents[1] / "results" / "texts"
LARGE = "text_import_file=ml-100k-texts.csv"
#: Row of the picture -> model of the pages, bottom up.
ROWS = {
    "both, on wrong nodes": f"GaCLLM:text_source=shuffled:{LARGE}",
    "no text": "GaCLLM:use_text=False",
    "a large LLM's": f"GaCLLM:{LARGE}:text_layers=1",
    "raw": "GaCLLM:text_source=raw",
    "raw and a large LLM's": f"GaCLLM:{LARGE}",
}
PAGES = {
    "ml-100k-all": "all interactions",
    "ml-100k-20-percent": "a fifth of them",
    "ml-100k-10-percent": "a tenth of them",
    "ml-100k-cold": "cold items",
    "ml-100k-cold-users": "cold users",
}


def draw() -> Figure:
    """The picture of the pages that are there."""
    pages = {stem: name for stem, name in PAGES.items() if (TEXTS / f"{stem}-runs.csv").exists()}
    made = Figure(figsize=(2.1 * len(pages) + 1.6, 2.6), layout="constrained")
    panels = made.subplots(1, len(pages), sharey=True, squeeze=False)[0]
    for panel, (stem, name) in zip(panels, pages.items(), strict=True):
        runs = pd.read_csv(TEXTS / f"{stem}-runs.csv").set_index("model")["test_ndcg@10"]
        for place, model in enumerate(ROWS.values()):
            if model in runs:
                scores = runs[[model]]
                panel.plot(scores, [place] * len(scores), "o", color=f"C{place}", alpha=0.35, ms=3)
                panel.plot([scores.mean()], [place], "D", color=f"C{place}")
        panel.set_title(name)
        panel.set_xlabel("NDCG@10")
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(ROWS)), list(ROWS))
    return made


if __name__ == "__main__":
    with rc_context(STYLE):
        draw().savefig(TEXTS / "ml-100k.svg", metadata=METADATA["svg"])
