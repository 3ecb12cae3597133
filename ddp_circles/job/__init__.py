"""One process among many: ranks, the process group, devices, stop requests, lost peers, planned faults."""
