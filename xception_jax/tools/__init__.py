"""Tools about the code base rather than about a network.

`planning` plans runs on hardware that you do not have. `simulate_statistics` measures how often the statistics of
studies are right.
"""
