"""``python -m mlxq``."""

from mlxq.cli import main

if __name__ == "__main__":
    main()
