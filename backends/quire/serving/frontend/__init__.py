"""The model `llm`: text in, text out, one process for each instance."""
