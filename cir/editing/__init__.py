"""One fact at a time: the editor, its edits as files, and the journal they are kept in.

Forgets with the steps of :mod:`cir.forgetting`.
"""
