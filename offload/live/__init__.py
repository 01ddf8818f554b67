"""A live model of anybody's: finding its blocks, refusing what others already move, streaming it."""
