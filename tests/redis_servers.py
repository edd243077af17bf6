"""Fixtures that start real Redis servers."""
