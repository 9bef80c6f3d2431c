"""`python -m lexplain` is `lexplain`."""

from __future__ import annotations

from lexplain.cli import main

if __name__ == "__main__":
    main()
