"""`python -m popcompile.cli` is `popcompile`."""

import sys

from popcompile.cli import main

sys.exit(main())
