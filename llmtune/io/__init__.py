"""Files: outputs that appear whole or not at all, fingerprints, YAML with origins, sizes."""
