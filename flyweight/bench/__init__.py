"""Measuring: how long, how large, on which machine."""
