"""The whole stack as local processes: Redis and the four services on one machine, without Docker."""
