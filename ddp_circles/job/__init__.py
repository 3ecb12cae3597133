"""Being one of many processes: who this process is, the group it belongs to, and what may happen to either."""
