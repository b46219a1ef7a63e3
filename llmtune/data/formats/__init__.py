"""One file per dataset format: a row becomes messages."""
