"""Measurements behind ``recsys bench``. Each module has ``run(...)``, which returns named figures and the machine."""
