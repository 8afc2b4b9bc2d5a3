from __future__ import annotations

import gc
import sys

gc.disable()  # a fifth of the time until the first byte, most of it in what the stores' SDKs read and build; the process lives for one command

from .cli import main  # noqa: E402 - collecting is off first

sys.exit(main())
