"""SASRec that begins as texts: ``python examples/sasrec_from_texts.py [seeds=3 key=value …]``.

One sees NDCG@10 and Recall@10 of plain SASRec, of SASRec whose item embeddings begin as the first
principal components of the items' text embeddings, of the same with the texts frozen under a
linear map, and of the control, which begins as the texts of other items.

Leave one out by time: one split, whatever the seed, which moves initialisation only. Twenty epochs
with one learning rate for all rows show the key at work and call no winner. For that take
epochs=300 seeds=3 and search each row (docs/tuning.md). No LLM is asked.
"""

import sys
from pathlib import Path

import pandas as pd

from recbole_gacllm.compare.leaderboard import run_leaderboard
from recbole_gacllm.compare.plan import make_plan
from recbole_gacllm.compare.tables import export

keys = {"dataset": "ml-100k", "seeds": "1", "text_source": "raw"}
keys |= {"epochs": "20", "learning_rate": "0.001", "train_batch_size": "1024"}
keys |= dict(word.split("=", 1) for word in sys.argv[1:])
dataset, n_seeds = keys.pop("dataset"), int(keys.pop("seeds"))
rows = {
    "SASRec": "plain",
    "SASRec:text_init=True": "begins as texts",
    "SASRec:text_init=True:text_init_frozen=True": "texts stay frozen",
    "SASRec:text_init=True:text_source=shuffled:llm_n_layers=0": "begins as wrong texts",
}

# The key works for any model of RecBole with a table of items: GRU4Rec, LightGCN, BPR, …
output = Path("saved/sasrec_from_texts")
plan = make_plan(list(rows), [dataset], n_seeds, protocol="sequential", config_dict=keys)
run_leaderboard(plan, output)
export(output, baseline="SASRec")

table = pd.read_csv(output / "results.csv").replace({"model": rows})
table = table[table["metric"].isin(["ndcg@10", "recall@10"])].sort_values("metric", kind="stable")
columns = ["metric", "model", "mean", "difference", "difference_low", "difference_high", "t_p_holm"]
print(table[columns].to_string(index=False, float_format="{:.4f}".format))
print(f"tables and figures: {output / 'results'}")
