"""Whole runs by name: each module is a function that does one thing from data to report."""
