"""``python -m tinkex``: the same as the command ``tinkex``."""

from tinkex.cli.main import main

if __name__ == "__main__":
    main()
