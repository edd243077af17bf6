"""What people use: the Python client and the command line."""
