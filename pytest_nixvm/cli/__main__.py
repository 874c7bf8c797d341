"""`python -m pytest_nixvm.cli`."""

import sys

from pytest_nixvm.cli import main

sys.exit(main())
