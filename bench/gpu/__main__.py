"""``python -m bench.gpu``: see the package."""

import sys

from bench.gpu.program import main

sys.exit(main())
