"""Models by their names on the hub: which of a repository's files are used, and how they come here, once per node."""
