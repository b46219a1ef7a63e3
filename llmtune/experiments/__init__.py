"""Several runs for one question: learning curve, sequence of tasks, seeds, one versus another."""
