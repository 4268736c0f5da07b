"""The papers' settings, one YAML file each."""
