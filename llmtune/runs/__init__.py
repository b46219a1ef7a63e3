"""One run: its directory, its ledger, and its stages in their order."""
