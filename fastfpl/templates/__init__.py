"""Folders that `fastfpl new` writes: every file ends with ``.txt`` here, and is named there."""
