"""The project's own small chat model: what it is told and asked, how it is trained, and how well it answers."""
