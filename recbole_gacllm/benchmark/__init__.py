"""Comparing models: leaderboards that resume, paired tests, tables, exports."""
