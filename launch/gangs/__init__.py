"""The ranks as one gang: under Ray, under torchrun, and which of them a run gets."""
