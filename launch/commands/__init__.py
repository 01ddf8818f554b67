"""What the commands do, whichever launcher runs them: arguments, what is printed, what is written."""
