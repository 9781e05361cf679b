"""The encoder: positions, norms, feed-forward, hybrid blocks, head, storage."""
