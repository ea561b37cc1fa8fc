"""Numbers and names as a reader meets them."""

from __future__ import annotations

import math
import re
from typing import Any

SPELLED = {
    "p_at_1": "P@1",
    "p_at_10": "P@10",
    "p@1": "P@1",
    "p@10": "P@10",
    "mrr": "MRR",
    "f1": "F1",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "bits_per_byte": "bits per byte",
    "bpb": "bits per byte",
    "nll": "NLL",
    "auc": "AUC",
    "kl": "KL",
    "fit": "training loss",
}

SMALLER_IS_BETTER = (
    *("perplexity", "loss", "cross_entropy", "nll", "bits_per_byte", "bpb", "kl"),
    *("ece", "error", "forgetting", "barrier"),
)
"""Words in a metric's name: less of it is better. Other metrics get better as they grow."""


def metric(name: str) -> str:
    """A metric's key as a reader says it: macro_f1 → macro F1."""
    if name.lower() in SPELLED:
        return SPELLED[name.lower()]
    return re.sub(r"\bp at (\d+)\b", r"P@\1", name.replace("_", " ").replace("/", " / "))


def smaller_is_better(name: str) -> bool:
    """Whether a drop of this metric is an improvement."""
    key = f"_{name.lower().replace('/', '_').replace(' ', '_')}_"
    return any(f"_{word}_" in key for word in SMALLER_IS_BETTER)


def number(value: Any) -> str:
    """Three significant digits, thousands apart; a true minus sign."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) >= 100):
        text = f"{int(value):,}".replace(",", " ")
    elif not math.isfinite(value):
        text = "∞" if value > 0 else "−∞" if value < 0 else "not a number"
    elif value == 0:
        text = "0"
    elif abs(value) >= 100:
        text = f"{value:,.0f}".replace(",", " ")
    elif abs(value) >= 10:
        text = f"{value:.1f}"
    elif abs(value) >= 0.001:
        text = f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    else:
        text = f"{value:.1e}".replace("e-0", "e-")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def tick(value: float) -> str:
    """A round value on an axis, no more digits than it has."""
    text = f"{value:.4g}"
    if "e" in text:
        text = f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def noted(value: Any) -> str:
    """A number that a method noted: whole ones as they are."""
    return number(int(value)) if isinstance(value, float) and value.is_integer() else number(value)


def signed(value: float) -> str:
    """A change with its sign."""
    if value == 0 or not math.isfinite(value):
        return "±0" if value == 0 else number(value)
    return ("+" if value > 0 else "−") + number(abs(value)).lstrip("−")


def share(value: float) -> str:
    """A probability in two digits; 0 and 1 only where it is."""
    if 0 < value < 0.005 or 0.995 < value < 1:
        return "< 0.01" if value < 0.5 else "> 0.99"
    return f"{value:.2f}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def size(count: float) -> str:
    """Bytes as people say them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def short(text: Any, limit: int = 320) -> str:
    """Text cut at a limit, with an ellipsis where it was cut."""
    whole = str(text)
    return whole if len(whole) <= limit else whole[: limit - 1].rstrip() + "…"


def listed(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"
