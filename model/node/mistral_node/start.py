"""vLLM's command, `python -m mistral_node.start serve ...`, which starts a quarter sooner: without the garbage collector, which would walk
all that vLLM imports again and again, until that is imported.

The processes that vLLM spawns run this module first, as Python does with the main module of whoever spawned them; in each of them vLLM calls
`register` when it has imported itself, which turns the collector on.
"""

from __future__ import annotations

import gc

if __name__ in ("__main__", "__mp_main__"):
    gc.disable()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
