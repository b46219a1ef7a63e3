"""What broke, what leaked, what was learned by heart: measurements beside the suites' scores."""
