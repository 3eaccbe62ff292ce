"""A typed client for Quire, sync and async, on tritonclient."""
