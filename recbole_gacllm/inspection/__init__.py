"""Looking into data and finished runs."""
