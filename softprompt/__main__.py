"""`python -m softprompt` is the command `softprompt`."""

import sys

from softprompt.cli import main

sys.exit(main())
