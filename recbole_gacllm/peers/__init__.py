"""Models of other papers on the texts of our hook, and texts for RecBole's own models."""
