"""Writes the small checkpoint's training text: a grammar, word lists of our own, and the kinds of text."""
