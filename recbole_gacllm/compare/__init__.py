"""Many runs: leaderboards, tuning, tables, tests."""
