"""The method: subspaces, losses, the update, the loop inside its budget, memory, report and profile.

``update.py`` alone changes weights.
"""
