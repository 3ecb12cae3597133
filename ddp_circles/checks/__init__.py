"""The parts of `ddp_circles.verify`: a board beside the collectives, and checks that know the right answer."""
