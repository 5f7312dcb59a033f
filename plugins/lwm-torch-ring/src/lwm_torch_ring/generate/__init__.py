"""Generation with a KV cache, on the trainer's own mesh."""
