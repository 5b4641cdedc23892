"""python full/elo.py: see full/study/elo.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from full.study.elo import main

if __name__ == "__main__":
    sys.exit(main())
