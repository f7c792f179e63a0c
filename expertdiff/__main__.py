"""``expertdiff`` and ``python -m expertdiff``."""

import sys

from expertdiff.status import status


def main() -> int:
    """Runs one verb; returns the exit code."""
    sys.path.append("")  # a configuration may name a class of a file beside the user
    if sys.argv[1:2] != ["status"]:
        from expertdiff.cli import main

        return main()
    try:  # answers within a second: torch and Lightning alone take longer to import
        status(sys.argv[2:])
    except (ValueError, OSError) as error:
        print(f"expertdiff: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
