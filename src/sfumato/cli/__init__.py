"""The command line, one file per command.

Each command imports what it needs when it runs, so that `--help` answers at once.
"""
