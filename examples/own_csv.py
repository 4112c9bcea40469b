"""From your own files to lists: ``python examples/own_csv.py purchases.csv products.csv``.

The first file has a row for each thing that somebody bought, the second what is known of a product;
without files it takes those of MovieLens-100k in RecBole. Columns are guessed by name and type.

One sees what was guessed and dropped, the metrics of a random tenth of each user's interactions,
which is one split of one seed, the lists of the first users, and the list of somebody who was not
in training. No LLM is asked: text_source "generated" has one describe everybody first.
"""

import sys
from pathlib import Path

import pandas as pd
import recbole

from recbole_gacllm import recommend
from recbole_gacllm.data.importing import Request, import_files
from recbole_gacllm.run import run

films = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k"
files = [Path(name) for name in sys.argv[1:]] or [
    films.with_suffix(".inter"),
    films.with_suffix(".item"),
]

# RecBole's files, and a yaml that says how a product becomes a sentence: dataset/my-shop/.
data_path = Path("dataset")
print(*import_files(Request(files, "my-shop", data_path, overwrite=True)), sep="\n")

# Train, validate, test. Every key of RecBole and of docs/config.md goes in here.
keys = {"data_path": str(data_path), "text_source": "raw", "epochs": 20, "show_progress": False}
done = run("GaCLLM", "my-shop", config_dict=keys)
print(done.record["test"])

# What to show to whom: a data frame of user, rank, item, title and score.
lists = recommend(done.run_file, k=5)
lists.to_csv("lists.csv", index=False)
print(lists.head(10).to_string(index=False))

# Somebody who was not in training, by three items, and what of a score came from which part.
newcomer = pd.DataFrame({"user": "somebody new", "item": lists["item"].head(3)})
table = recommend(done.run_file, history=newcomer, k=5, explain=True)
print(table.drop(columns="description").to_string(index=False))
