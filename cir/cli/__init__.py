"""What people type: the parser, the commands, what they read, and the demo.

Imports torch only where a command runs.
"""

from cir.cli.commands import main

__all__ = ["main"]
