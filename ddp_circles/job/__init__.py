"""Being one of many processes: ranks, the process group, devices, stop requests, lost peers, planned faults."""
