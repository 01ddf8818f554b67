"""The engine: a gang that holds one model and answers requests, and what survives of one when ranks are lost."""
