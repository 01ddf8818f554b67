"""What a run is to be: the config as a schema, as a YAML file, and what can be wrong with it."""
