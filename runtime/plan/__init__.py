"""What every rank will hold, decided before a rank exists: whatever can be wrong with the input is found here."""
