"""Who is to blame, or awaited, when ranks stop answering, raise, or issue other collectives than their group."""
