"""Whether the tuning worked: facts in (`evidence`), rules in order (`rules`), outcome out."""
