"""What every gang of processes needs: what hosts a rank, where ranks meet, and the wait for their results."""
