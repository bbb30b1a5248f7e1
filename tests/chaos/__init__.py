"""What the line survives: each fault is done to it on purpose, and counted.

python -m tests.chaos                          every fault, in its short form
python -m tests.chaos --long kills flips       these two, in full
python -m tests.chaos --json chaos.json        the figures as well, as JSON
"""
