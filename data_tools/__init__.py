"""Preprocessing command line, `python -m data_tools COMMAND`: from JSONL files to a pack plan."""
