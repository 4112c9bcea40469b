"""A leaderboard in Python: ``python examples/leaderboard.py ml-100k epochs=20``.

What comes after the data set are keys of RecBole and of this package. No LLM is asked. A row may be
a variant, so an ablation is such a list, too. Start it again after a kill: what is finished is not
run again.
"""

import sys
from pathlib import Path

from recbole_gacllm.compare.leaderboard import run_leaderboard
from recbole_gacllm.compare.plan import make_plan
from recbole_gacllm.compare.results import Board, summarize
from recbole_gacllm.compare.tables import export

dataset, *words = sys.argv[1:]
keys = dict(word.split("=", 1) for word in words)
models = ["GaCLLM:text_source=raw", "GaCLLM:use_text=False", "Pop"]
output = Path("saved/leaderboard")

# Every configuration is checked before the first run; the splits of a seed are proved equal.
plan = make_plan(models, [dataset], n_seeds=1, config_dict=keys)
run_leaderboard(plan, output)

# Pages in Markdown, LaTeX and CSV, figures in SVG and PNG.
print(*export(output, baseline="Pop"), sep="\n")

# The same numbers as plain values: means over seeds (one here), intervals and tests over users.
table = summarize(Board.read(output), baseline="Pop")["datasets"][dataset]
for model, row in table["models"].items():
    cell = row["metrics"]["ndcg@10"]
    low, high = cell["interval"]
    line = f"{model:24} NDCG@10 {cell['mean']:.4f} [{low:.4f}, {high:.4f}]"
    if cell["test"]:
        line += f", {cell['test']['difference']:+.4f} to Pop, p = {cell['test']['t_p_holm']:.2g}"
    print(line)
