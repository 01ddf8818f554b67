"""One rank's weights: reading its bytes, mapping them, comparing what arrives with the file."""
