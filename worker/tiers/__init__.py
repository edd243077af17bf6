"""KV in memory and below: where it lies, and what moves and encodes it."""
