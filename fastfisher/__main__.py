"""``python -m fastfisher``: the same as the command ``fastfisher``."""

import sys

from fastfisher.cli import main

sys.exit(main())
