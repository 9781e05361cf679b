"""Run a stage: paths from the command line (dvc.yaml is the only place where they stand), params.yaml, clear errors."""

import argparse
import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frankenstein.errors import FrankensteinError
from frankenstein.params import load_params


def run(main: Callable[..., Any]) -> None:
    """Call `main(params, *, name=path, ...)`; every keyword-only parameter of it is a required `--name PATH`.

    What the user did wrong ends in one message on stderr and exit code 2.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{Path(sys.argv[0]).stem}", description=inspect.getdoc(main)
    )
    for name, parameter in inspect.signature(main).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=Path, required=True, metavar="PATH")
    paths = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        main(load_params("params.yaml"), **paths)
    except FrankensteinError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
