"""How a fault reports: figures with what they must be, in one table."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One count. `goal` is what it must be, or may be `at_most`; None where it is only told."""

    fault: str
    figure: str
    value: Any
    goal: Any = None
    unit: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.value <= self.goal if self.at_most else self.value == self.goal

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def table(figures: list[Figure]) -> str:
    """Fault x figure, with the goal beside what was found."""
    lines = []
    for each in figures:
        goal = (
            f"(goal {'at most ' if each.at_most else ''}{each.goal})"
            if each.goal is not None
            else ""
        )
        mark = "" if each.met else "  <-- NOT MET"
        value = f"{each.value:,}" if isinstance(each.value, int) else str(each.value)
        lines.append(f"{each.fault:10} {each.figure:58} {value:>10} {each.unit:8} {goal}{mark}")
    return "\n".join(line.rstrip() for line in lines)
