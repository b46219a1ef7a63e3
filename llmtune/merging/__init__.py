"""Adding an adapter into its base, tile by tile."""
