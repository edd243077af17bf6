"""The engine: one thread, its requests and blocks, and what it runs next."""
