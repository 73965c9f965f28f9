"""``python -m cir``: the command line, which this room does not import."""

import runpy

runpy.run_module("cir.cli", run_name="__main__", alter_sys=True)
