"""Measured rotation: angles, a callback that records them, plots."""
