"""`python -m llada` is `llada`."""

import sys

from llada.commands.program import main

sys.exit(main())
