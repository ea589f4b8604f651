"""The errors that a user can mend. The command line prints them as one message, without a traceback."""


class KeyreidError(Exception):
    """Bad input or an environment that cannot do what was asked; the message says which and what to do."""


class DataError(KeyreidError):
    """A dataset, shard or picture that is missing, damaged or inconsistent; names the file, sample and member."""


class ConfigError(KeyreidError):
    """A configuration that cannot be used; names the key."""


class CheckpointError(KeyreidError):
    """A checkpoint or a weights file that cannot be used; names the file."""


def install_hint(extra: str) -> str:
    """What to do where an optional part is missing. (The `keyreid` of PyPI is another project.)"""
    return f"in the clone of keyreid: pip install -c constraints.txt -e '.[{extra}]'"
