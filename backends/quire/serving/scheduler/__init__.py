"""The model `scheduler`: the step loop, and the executor that reaches the hosted engine."""
