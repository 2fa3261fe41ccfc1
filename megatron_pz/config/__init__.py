"""Settings: frozen dataclasses, TOML and flags, and the rules that hold between fields. Checked before anything is loaded."""
