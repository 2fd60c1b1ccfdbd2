"""Extending a pipeline from outside, at two points: the network's call and ``scheduler.step``."""
