"""The whole system under faults and overload."""
