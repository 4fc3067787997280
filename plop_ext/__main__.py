"""`python -m plop_ext` is the `plop` command."""

import sys

from plop_ext.cli.main import main

sys.exit(main())
