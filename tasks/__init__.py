"""The work of each Luigi task: plain functions on paths, free of Luigi.

Each stage is one module with one public function of the same name. `python -m tasks.propose
CONFIG.json` runs it by hand from the configuration recorded in an artifact.
"""
