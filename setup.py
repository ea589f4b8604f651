"""What pyproject.toml cannot say: folders of the clone that travel inside the package, beside its modules.

keyreid/resources.py finds them in either place; which of their files travel, pyproject.toml says.
"""

from setuptools import find_packages, setup

FOLDERS = {f"keyreid.{name}": name for name in ("configs", "launch", "slurm")}

setup(packages=[*find_packages(include=["keyreid*"]), *FOLDERS], package_dir=FOLDERS)
