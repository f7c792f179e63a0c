"""``python -m expertdiff``."""

import sys

from expertdiff.cli import main

sys.exit(main())
