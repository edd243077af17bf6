"""The model: found, refused or loaded, named, and run."""
