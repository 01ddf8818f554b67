"""The diffusers pipeline around the sharded transformer, on one rank: its components, its denoise loop, its snapshots."""
