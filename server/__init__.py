"""The front end: services, sessions, routing, health. It knows neither torch nor the worker's code."""
