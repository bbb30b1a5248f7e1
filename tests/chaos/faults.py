"""Every fault by name."""

from tests.chaos.damage import flips, upgrade
from tests.chaos.disks import disk, places
from tests.chaos.hostile import hostile
from tests.chaos.kills import kills
from tests.chaos.power import power
from tests.chaos.rivals import downloads, engines, races

FAULTS = {
    "kills": kills,
    "disk": disk,
    "flips": flips,
    "races": races,
    "engines": engines,
    "downloads": downloads,
    "places": places,
    "hostile": hostile,
    "upgrade": upgrade,
    "power": power,
}
