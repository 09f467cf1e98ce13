"""Code that the tests share: services, databases, loads, networks, poolers and standbys."""
