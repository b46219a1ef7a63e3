"""Rows to messages to tokenized examples with exact loss masks."""
