"""The processes of the service: their settings, how they start, handle connections and stop."""
