"""The comparison of finished runs: reading them, statistics, tables and figures."""
