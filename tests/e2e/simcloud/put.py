"""put.py CLOUD FOLDER URL: uploads a folder to a cloud's object store, with the laptop's credentials."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from simcloud import clouds

if __name__ == "__main__":
    _, name, folder, url = sys.argv
    if not clouds.backend(name).STORE.put(Path(folder), url):
        raise SystemExit(f"{folder}: there is no file in it that the laptop can see")
