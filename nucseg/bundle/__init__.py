"""Everything that a machine without a network needs, in one folder: `make` makes it, `wheels` unpacks packages there.

Nothing is imported here: `wheels` runs on that machine before its packages are there.
"""
