"""Modules for machines that lack a library which the engine can do without: searched after all that is installed."""
