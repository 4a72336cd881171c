"""What the benchmark commands share: a line of JSON for each figure."""

import json
from typing import Any


def show(**figures: Any) -> dict[str, Any]:
    """Prints the figures as one line, numbers to five digits; returns what it says."""
    rounded = {
        k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()
    }
    print(json.dumps(rounded), flush=True)
    return rounded
