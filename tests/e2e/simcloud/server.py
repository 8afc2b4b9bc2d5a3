"""server.py CLOUD FOLDER IMAGE: serves one simulated cloud."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from simcloud import clouds, linux

if __name__ == "__main__":
    linux.die_with_parent()
    _, name, folder, image = sys.argv
    clouds.backend(name).serve(Path(folder), Path(image))
