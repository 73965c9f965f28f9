"""One reader a data set, each in a file of its own: where it is on the hub, and how a row becomes a fact.

:data:`cir.data.datasets.SOURCES` is the table of them.
"""
