"""Named problems, the float64 oracle and the tolerances that tests and benchmarks share."""
