"""The command ``tinkex``, which also runs as ``python -m tinkex``."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command; Ctrl-C while its modules are still being imported ends it cleanly, too."""
    try:
        from tinkex.cli.main import main as run
    except KeyboardInterrupt:
        if sys.stderr is not None:
            sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
