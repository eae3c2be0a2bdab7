"""`python -m llada` is `llada`."""

import sys

from llada.commands.program import start

sys.exit(start())
