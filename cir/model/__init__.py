"""Where a Hugging Face model is tapped, run, loaded and saved: sites, capture, checkpoints, offloading.

Knows models; nothing of forgetting. ``capture.py`` alone touches autograd.
"""
