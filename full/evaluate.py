"""python full/evaluate.py: see full/study/evaluate.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from full.study.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
