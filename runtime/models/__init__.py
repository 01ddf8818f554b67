"""What a checkpoint holds, and the transformer that is sharded and streamed, built without its weights."""
