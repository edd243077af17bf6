"""Attention over the block pool, by device."""
