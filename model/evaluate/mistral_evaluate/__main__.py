"""`python -m mistral_evaluate < JOB`: events as lines of JSON on standard output; if it fails, one line on standard error.

Exit codes: 0 done, 1 failed, 130 interrupted. The same job again asks only what has no answer yet.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from mistral_evaluate import job as jobs
from mistral_evaluate.errors import EvaluateError

QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "LMEVAL_LOG_LEVEL": "ERROR", "USE_TORCH": "0",
}  # fmt: skip


def main() -> int:
    """Evaluate what standard input tells."""
    os.environ |= QUIET
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries write there

    def tell(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    try:
        job = jobs.read(sys.stdin.read())
        from mistral_evaluate.run import run

        logging.getLogger("httpx").setLevel(logging.WARNING)
        run(job, tell)
    except EvaluateError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command asks only the rest\n")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
