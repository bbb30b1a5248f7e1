"""The work of each Luigi task, as plain functions on paths that know nothing of Luigi.

Each stage is one module with one public function of the same name. `python -m tasks.propose
recipe.json` runs it by hand, with the recipe.json that an artifact holds.
"""
