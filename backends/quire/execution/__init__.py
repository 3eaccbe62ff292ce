"""Driving an engine: its inputs, its manifest, sampling, and one file per executor."""
