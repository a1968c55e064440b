"""The options of ``fastfisher reproduce``; apart from reproduce.py, so that ``--help`` does not import matplotlib."""

from __future__ import annotations

import argparse

from fastfisher.paper.cases import SCALES
from fastfisher.paper.experiments import THEMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastfisher reproduce``."""
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"what to reproduce: {', '.join(THEMES)}")
    parser.add_argument("--all", action="store_true", help="everything, and a page about the twelve claims")
    parser.add_argument("--list", action="store_true", help="say what there is, how many runs each takes and how long")
    parser.add_argument("--scale", choices=SCALES, default="digits", help="digits: small; paper: the paper's setting")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of each run; by default what the id asks for")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder with the data sets (--scale paper)")
    parser.add_argument("--out", default=None, metavar="DIR", help="folder for runs and reports (default: runs/SCALE)")
    parser.add_argument("--device", default=None, help="auto, cpu, cuda or cuda:N (default: cpu for digits, else auto)")
    parser.add_argument("--dry-run", action="store_true", help="two short steps of each kind of run, and the reports")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--jobs", type=int, default=None, help="runs at once on this machine (default: digits all cores)"
    )
    where.add_argument(
        "--ray", default=None, metavar="ADDRESS", help="spread over a Ray cluster; local starts one here"
    )
