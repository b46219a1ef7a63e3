"""One thing compared with another: how far what was written differs from what it was made from."""
