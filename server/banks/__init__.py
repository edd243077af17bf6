"""Banks of knowledge in the front end: what is kept of them in memory, how it is searched, scored and changed."""
