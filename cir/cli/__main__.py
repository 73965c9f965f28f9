import sys

from cir.cli.commands import main

sys.exit(main())
