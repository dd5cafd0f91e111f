"""A state machine that trains, samples, saves, cancels and closes in random order, over faults."""
