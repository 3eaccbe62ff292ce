"""Finding a Triton server, starting it on a model repository, draining and stopping it."""
