"""Models of other papers on the texts of our hook, and texts for RecBole's own models.

A model is constructed as :class:`.GaCLLM` is: of RecBole's configuration, its **training** split,
and perhaps ``texts_of``, which gives the text embeddings in place of the stages.
"""
