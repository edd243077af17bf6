"""Measurements, each of both sides in one run: `rekindle bench NAME`."""
