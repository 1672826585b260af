"""Everything is in pyproject.toml. This file stands for tools that still look for it."""

from setuptools import setup

setup()
