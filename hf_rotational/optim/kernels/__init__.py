"""Whole optimizer steps in one pass over memory; :mod:`hf_rotational.optim.step` says the same in tensor operations."""
