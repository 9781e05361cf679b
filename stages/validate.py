"""Check params.yaml before any other stage runs; the output never varies, so it re-runs nobody."""

from pathlib import Path

from frankenstein.artifact import write_text
from frankenstein.inputs import check_inputs
from frankenstein.params import Params
from stages.runner import run


def main(params: Params, *, ok: Path) -> None:
    """Check params.yaml and that the inputs it names exist."""
    check_inputs(params)
    write_text(ok, "valid\n")


if __name__ == "__main__":
    run(main)
