"""Texts that some API's model wrote: ``python examples/api_texts.py [ANSWERS] [key=value …]``.

Without ANSWERS it writes ``questions.jsonl``, a line of id and question for each film of ml-100k:
send these to any model. ANSWERS is a CSV or JSONL of id and text. One sees how many films it
covers, then NDCG@10 of runs on raw texts (titles and genres) and these side by side, on raw ones
alone, on both at the wrong films and people, and on none, with paired tests over users (Holm).

The split is RecBole's, random, of seed 2025; the preset was tuned on other seeds. Films without an
answer keep their raw text, and so do people. A model that has read about these films knows more of
them than their titles tell, so read some answers: what is new to it gains less.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from recbole_gacllm.compare.leaderboard import run_leaderboard
from recbole_gacllm.compare.plan import make_plan
from recbole_gacllm.compare.tables import export
from recbole_gacllm.inputs import raw_descriptions
from recbole_gacllm.run_config import training_data

answers = [word for word in sys.argv[1:] if "=" not in word]
keys = {"dataset": "ml-100k", "seeds": "1", "seed": "2025"}
keys |= dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
dataset, n_seeds = keys.pop("dataset"), int(keys.pop("seeds"))
raw, _ = raw_descriptions(*training_data(dataset, config_dict=keys))
raw_texts = dict(zip(raw.tokens["item"], raw.texts["item"], strict=True))

if not answers:
    ask = "Say in three sentences what this is about and who likes it. Use facts, no title."
    lines = [json.dumps({"id": id, "question": f"{ask}\n{raw_texts[id]}"}) for id in raw_texts]
    Path("questions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"questions.jsonl has {len(lines)} questions; come back with their answers")
    sys.exit()

# A CSV or JSONL of id and text becomes layer 1 of the items. Ids are strings: "007" is not 7.
file = Path(answers[0])
is_csv = file.suffix == ".csv"
table = pd.read_csv(file, dtype=str) if is_csv else pd.read_json(file, lines=True, dtype=False)
texts = table.assign(side="item", token=table["id"].astype(str), layer=1)
texts[["side", "token", "layer", "text"]].to_parquet("texts.parquet")
n_known = texts["token"].isin(raw_texts).sum()
print(f"texts of {n_known} of {len(raw_texts)} items; {len(texts) - n_known} unknown ids")

rows = {
    "GaCLLM:text_import_file=texts.parquet": "raw texts and these",
    "GaCLLM:text_source=raw": "raw texts",
    "GaCLLM:text_import_file=texts.parquet:text_source=shuffled": "both at wrong nodes",
    "GaCLLM:use_text=False": "no text",
}
keys["llm_n_layers"] = "1"
output = Path("saved/api_texts")
run_leaderboard(make_plan(list(rows), [dataset], n_seeds, config_dict=keys), output)
export(output, baseline=next(iter(rows)))

table = pd.read_csv(output / "results.csv").query("metric == 'ndcg@10'").replace({"model": rows})
columns = ["model", "mean", "difference", "difference_low", "difference_high", "t_p_holm"]
print(table[columns].to_string(index=False, float_format="{:.4f}".format))
print(f"tables and figures: {output / 'results'}")
