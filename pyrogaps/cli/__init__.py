"""The command: recipes, what they build, and the stages of a run. Nothing of the library imports it."""
