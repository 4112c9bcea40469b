"""From your own files to lists: ``python examples/own_csv.py purchases.csv products.csv``.

The first file has a row for each thing that somebody bought, the second what is known of a product.
Columns are guessed by name and type; what was guessed and dropped is printed. No LLM is asked: with
``text_source="generated"`` in the place of ``raw`` one describes every user and product first.
"""

import sys
from pathlib import Path

from recbole_gacllm import recommend
from recbole_gacllm.data.importing import Request, import_files
from recbole_gacllm.run import run

files = [Path(name) for name in sys.argv[1:]]

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
