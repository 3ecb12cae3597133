"""A program of its own: does this machine, or this cluster, compute right? Checks that know the right answer."""
