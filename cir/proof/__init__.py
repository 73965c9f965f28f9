"""What shows whether it is forgotten: cheap attacks, relearning, lm-eval's tasks, the certificate.

Everything here leaves the model as it came.
"""
