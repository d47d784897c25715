"""The command line: ``ntk-lazy study | spectrum | explain | doctor | report``."""

from ntk_lazy.cli.main import main

__all__ = ["main"]
