"""The method: where facts are, subspaces, losses, the update, the loop inside its budget, memory, report, profile.

``update.py`` alone changes weights.
"""
