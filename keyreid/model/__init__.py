"""The KeyRe-ID network."""
