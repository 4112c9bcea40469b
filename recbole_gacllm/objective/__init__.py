"""The paper's fourth module: matching scores and their losses."""
