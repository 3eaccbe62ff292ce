"""Text on the way in and out: tokenizer, incremental detokenizer, stop strings. Stands alone."""
