"""Data sets: the simulator, and loaders of public data sets in their original files."""
