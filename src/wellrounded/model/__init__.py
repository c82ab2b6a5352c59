"""Any decoder as a chain of blocks, found by structure: no architecture is named anywhere in here."""
