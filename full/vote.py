"""python full/vote.py: see full/study/vote.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from full.study.vote import main

if __name__ == "__main__":
    sys.exit(main())
