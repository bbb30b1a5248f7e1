"""Every fault by name."""

from tests.chaos.kills import kills

FAULTS = {"kills": kills}
