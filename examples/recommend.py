"""Lists of a finished run, for its users and for a new one: ``python examples/recommend.py RUN``.

RUN is a run's folder, which the last line of a run's output names, such as that of

    python run_recbole_gacllm.py --dataset=ml-100k --text_source=raw
"""

import sys

import pandas as pd

from recbole_gacllm import recommend

run = sys.argv[1]

# Everybody's lists, as RecBole's test evaluation ranks: one row for each item of each list.
lists = recommend(run, k=10)
print(lists.head(10).to_string(index=False))

# Somebody who was not in training, by three items of a known user.
items = lists["item"].head(3)
newcomer = pd.DataFrame({"user": "somebody new", "item": items})
print(recommend(run, history=newcomer, k=5).to_string(index=False))

# What the scores are the sum of, and which items of the history are nearest.
why = recommend(run, users=[lists["user"][0]], k=5, explain=True)
print(why.drop(columns="description").to_string(index=False))
