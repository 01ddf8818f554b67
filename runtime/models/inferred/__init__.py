"""What can be read off a model that no family describes."""
