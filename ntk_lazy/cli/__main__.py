"""``python -m ntk_lazy.cli`` is ``ntk-lazy``."""

import sys

from ntk_lazy.cli.main import main

sys.exit(main())
