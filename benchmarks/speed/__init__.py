"""How fast a run is, against what a user would take instead, and what its parts cost."""
