"""A leaderboard in Python: ``python examples/leaderboard.py [seeds=3 key=value …]``.

One sees the files of the tables and figures, then for each model the mean NDCG@10 over the seeds,
its 95 % interval over users, and its difference from Pop (paired t test over users, Holm).

The split is RecBole's, random, and another one for each seed, the same for all models. The keys
are those of RecBole and of this package, and hold for every model. No LLM is asked. Start it again
after a kill: what is finished is not run again.
"""

import sys
from pathlib import Path

from recbole_gacllm.compare.leaderboard import run_leaderboard
from recbole_gacllm.compare.plan import make_plan
from recbole_gacllm.compare.results import Board, summarize
from recbole_gacllm.compare.tables import export

keys = {"dataset": "ml-100k", "seeds": "1"} | dict(word.split("=", 1) for word in sys.argv[1:])
dataset, n_seeds = keys.pop("dataset"), int(keys.pop("seeds"))
models = ["GaCLLM:text_source=raw", "EASE", "Pop"]
output = Path("saved/leaderboard")

# Every configuration is checked before the first run; the splits of a seed are proved equal.
plan = make_plan(models, [dataset], n_seeds, config_dict=keys)
run_leaderboard(plan, output)

# Pages in Markdown, LaTeX and CSV, figures in SVG and PNG.
print(*export(output, baseline="Pop"), sep="\n")

# The same numbers as plain values.
table = summarize(Board.read(output), baseline="Pop")["datasets"][dataset]
for model, row in table["models"].items():
    cell = row["metrics"]["ndcg@10"]
    low, high = cell["interval"]
    line = f"{model:24} NDCG@10 {cell['mean']:.4f} [{low:.4f}, {high:.4f}]"
    if cell["test"]:
        line += f", {cell['test']['difference']:+.4f} to Pop, p = {cell['test']['t_p_holm']:.2g}"
    print(line)
