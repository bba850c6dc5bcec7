"""The command nanopack as a script: arguments -> exit code, and what it writes."""

import sys

from nanopack.cli.main import main

sys.exit(main())
