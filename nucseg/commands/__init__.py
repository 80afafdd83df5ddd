"""The commands of ``nucseg``: the paper's, those for one's own slides, and those between machines."""
