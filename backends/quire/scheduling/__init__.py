"""What runs next, and where its keys and values live: no I/O, no Triton, no torch."""
