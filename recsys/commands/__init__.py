"""The commands of ``recsys``, one a file.

Each module is imported at start, so that ``--help`` knows its options, and must therefore import only Typer and the
standard library at its top: everything heavy is imported inside the function, when the command runs.
"""
