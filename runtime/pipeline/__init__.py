"""The diffusers pipeline around the sharded transformer, as one rank runs it."""
