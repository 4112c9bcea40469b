"""The paper's third module: texts as constant embeddings, aligned and fused with the graph's."""
