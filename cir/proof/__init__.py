"""What shows whether it is forgotten: cheap attacks, relearning, lm-eval's tasks, statistics, the certificate.

Everything here leaves the model as it came.
"""
