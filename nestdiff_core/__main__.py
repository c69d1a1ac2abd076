"""`python -m nestdiff_core`: every stage from the command line, without Dagster."""

from nestdiff_core.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
