"""The processes: how they are set up and started, what they do with connections, and how they stop."""
