"""The verbs of the command line, one module each, named after the verb.

They hold no logic: each parses its options, imports what it needs when it runs (so that `keyreid --help` is quick)
and calls the package.
"""
