"""What ranks tell: what they hold, what they did, what they are doing."""
