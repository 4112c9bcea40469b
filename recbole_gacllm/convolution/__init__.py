"""The paper's second module: descriptions rewritten over the training graph."""
