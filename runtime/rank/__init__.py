"""One rank: what it loads, cuts, streams, runs and reports."""
