"""Metrics as files for ``evaluate.load(path)``, which works without a network; by name it would ask the Hub."""
