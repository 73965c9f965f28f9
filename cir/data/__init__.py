"""What is forgotten and what is read: facts, data sets, token batches, and the texts that ship with the package.

Knows files and tokenizers; no models.
"""
