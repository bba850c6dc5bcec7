"""`python -m nanopack.cli` is the command `nanopack`."""

import sys

from nanopack.cli.main import main

sys.exit(main())
