"""Commands of the command line that are small enough for one module."""
