"""Where a merged model keeps what it was made from."""

PROVENANCE_FILE = "llmtune_merge.json"
