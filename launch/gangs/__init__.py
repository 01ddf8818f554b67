"""The ranks as one gang: of this machine, under Ray, under torchrun, and which of them a run gets."""
